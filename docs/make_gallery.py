"""Run the examples and keep their figures and what they printed, for the gallery of the documentation.

    python docs/make_gallery.py                 # all, about half an hour on one core
    python docs/make_gallery.py lorenz hiv      # these alone

Nothing is pasted by hand: what an example writes to its ``--out`` folder comes to
``docs/figures/gallery/<example>_<figure>.png``, with fewer colors, and what it prints to
``docs/figures/gallery/<example>.txt``, without times, which belong to a quiet machine (``benchmarks/``).
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
#: Scripts of the gallery, with the arguments of the run that is shown.
EXAMPLES: dict[str, list[str]] = {
    "bimodal": [],
    "lynx_hare": [],
    "lorenz": [],
    "mixture_posterior": [],
    "vae_digits": [],
    "hiv": [],
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
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"examples/{name}.py", *EXAMPLES[name], "--out", folder]
        printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        GALLERY.mkdir(parents=True, exist_ok=True)
        for figure in sorted(Path(folder).glob("*.png")):
            shrink(figure, GALLERY / f"{name}_{figure.name}")
    shown = " ".join(["$ python", f"examples/{name}.py", *EXAMPLES[name]])
    text = _FILES.sub("", _TIMES.sub("", printed))
    (GALLERY / f"{name}.txt").write_text(f"{shown}\n{text}")


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
