"""Run the examples and keep their figures and what they printed, for the gallery of the documentation.

    python docs/make_gallery.py                 # all, about a quarter of an hour on one core
    python docs/make_gallery.py lorenz hiv      # these alone

Nothing is pasted by hand: what an example writes to its ``--out`` folder comes to
``docs/figures/gallery/<example>_<figure>.png``, with fewer colors, what it prints to
``<example>.txt``, without times, which belong to a quiet machine (``benchmarks/``), and ``<example>.md`` puts
both on the page.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "figures" / "gallery"
#: Scripts of the gallery, with the arguments of the run that is shown, and what their figures show.
EXAMPLES: dict[str, tuple[list[str], dict[str, str]]] = {
    "bimodal": ([], {"bimodal": "Densities of SVI and AdaAnnSVI over the exact one, and the schedule"}),
    "mixture_1d": (
        [],
        {"densities": "Densities of SVI and AdaAnnSVI over the exact one", "schedule": "The schedule"},
    ),
    "mixture_2d": (
        [],
        {"densities": "The exact density, SVI and AdaAnnSVI", "schedule": "The schedule"},
    ),
    "lynx_hare": (
        [],
        {
            "trajectories": "Counts over the trajectories, with bands of 90 percent",
            "pairs": "Marginals and pairs of the eight parameters",
            "schedule": "The schedule",
        },
    ),
    "lorenz": (
        [],
        {
            "data": "The noisy data and fifty posterior trajectories",
            "posterior": "Marginals and pairs of the three parameters",
            "schedule": "The schedule",
        },
    ),
    "mixture_posterior": (
        ["--num-seeds", "3"],
        {"mixture_posterior": "The exact posterior, SVI and the four paths"},
    ),
    "vae_digits": ([], {"vae_digits": "Held-out digits, reconstructions and new samples of the four ways"}),
    "hiv": (
        [],
        {
            "data": "The noisy data and fifty posterior trajectories",
            "posterior": "Marginals and pairs of the three parameters",
            "schedule": "The schedule",
        },
    ),
}
MAX_WIDTH = 1400  # pixels: twice the column of the site, for sharp screens
NUM_COLORS = 128
#: In what is printed: times, which vary, and names of files, which are temporary.
_TIMES = re.compile(r",? \d+ s(?: for both fits)?\b")
_FILES = re.compile(r"^wrote .*\n", flags=re.MULTILINE)


def shrink(source: Path, target: Path) -> None:
    """Write a figure with fewer pixels and colors, a tenth of its size."""
    with Image.open(source) as image:
        picture = image.convert("RGB")
    if picture.width > MAX_WIDTH:
        height = round(picture.height * MAX_WIDTH / picture.width)
        picture = picture.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    picture.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(target, optimize=True)


def run(name: str) -> None:
    """Run one example and keep what it made."""
    arguments, captions = EXAMPLES[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"examples/{name}.py", *arguments, "--out", folder]
        printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        GALLERY.mkdir(parents=True, exist_ok=True)
        for figure in captions:
            shrink(Path(folder) / f"{figure}.png", GALLERY / f"{name}_{figure}.png")
    shown = " ".join(["$ python", f"examples/{name}.py", *arguments])
    text = _FILES.sub("", _TIMES.sub("", printed))
    (GALLERY / f"{name}.txt").write_text(f"{shown}\n{text}")
    write_page(name)


def write_page(name: str) -> None:
    """Write the part of the page that shows output and figures of one example."""
    parts = [f"```{{literalinclude}} figures/gallery/{name}.txt\n:language: text\n:class: prose\n```"]
    for figure, caption in EXAMPLES[name][1].items():
        parts.append(f"![{caption}](figures/gallery/{name}_{figure}.png)")
    (GALLERY / f"{name}.md").write_text("\n\n".join(parts) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the examples that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *EXAMPLES], help="examples, by default all")
    names = parser.parse_args(arguments).names or list(EXAMPLES)
    for name in names:
        print(f"{name} ...", flush=True)
        run(name)


if __name__ == "__main__":
    main()
