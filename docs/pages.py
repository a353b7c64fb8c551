"""The programs on the pages of the documentation: read, run, and their output kept.

A fenced block of Python is run as it stands, the blocks of one page one after the other in one
namespace. A ``diff`` block is two programs, the lines before and the lines after, and both are run. A block
whose first line ends in ``slow: <reason>`` is left out unless asked for::

    ```python slow: ten minutes
    ```python name=verdict
    ```python quick: num_steps=3000 -> num_steps=30; AdaAnnSchedule(0.1) -> AdaAnnSchedule(1.0)

A block with ``quick: old -> new; ...`` is run with these texts replaced where it is only tried, and as it
stands where its output is kept. The output and the figure of a named block are kept by ``make_figures.py``,
and the page shows them.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PAGES", "ROOT", "Block", "Printed", "blocks", "run_diff", "run_page"]

ROOT = Path(__file__).resolve().parents[1]
#: All pages with programs, and those that may have some one day.
PAGES = [ROOT / f"{name}.md" for name in ("README", "PACKAGE", "CONTRIBUTING")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

_FENCE = re.compile(r"^```(python|diff)([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    :param language: ``"python"`` or ``"diff"``.
    :param code: what is in it.
    :param line: where it starts, counted from 1.
    :param name: under which its output is kept, or the empty string.
    :param reason: why it is slow, or the empty string.
    :param quick: texts of the code, and what stands for each of them in a short run.
    """

    language: str
    code: str
    line: int
    name: str = ""
    reason: str = ""
    quick: tuple[tuple[str, str], ...] = ()

    def shortened(self) -> str:
        """Return the code of a short run.

        :raises ValueError: if a text to be replaced is not in the code exactly once.
        """
        code = self.code
        for old, new in self.quick:
            if code.count(old) != 1:
                raise ValueError(
                    f"Expected {old!r} once in the block at line {self.line}; got {code.count(old)}."
                )
            code = code.replace(old, new)
        return code


@dataclass
class Printed:
    """What the named blocks of a page have printed, by name, and their figures."""

    texts: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text = page.read_text()
    for match in _FENCE.finditer(text):
        language, info, code = match.groups()
        name = re.search(r"name=(\w+)", info)
        reason = re.search(r"slow: (.+)", info)
        quick = re.search(r"quick: (.+)", info)
        yield Block(
            language,
            code,
            text.count("\n", 0, match.start()) + 1,
            name[1] if name else "",
            reason[1] if reason else "",
            tuple(_pair(text) for text in quick[1].split("; ")) if quick else (),
        )


def _pair(text: str) -> tuple[str, str]:
    old, new = text.split(" -> ")
    return old, new


def sides(code: str) -> tuple[str, str]:
    """Return the programs before and after a diff."""
    lines = code.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    return before, after


def run_page(page: Path, *, slow: bool = False, quick: bool = False) -> Printed:
    """Run the Python blocks of a page in one namespace.

    :param slow: whether blocks with a reason to be slow are run too.
    :param quick: whether blocks are run shortened, where they say how.
    """
    printed = Printed()
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python" and (slow or not block.reason):
            known = _figures()
            text = _run(block.shortened() if quick else block.code, page, block.line, namespace)
            if block.name:
                printed.texts[block.name] = text
                new = _figures() - known
                if new:
                    printed.figures[block.name] = sys.modules["matplotlib.pyplot"].figure(max(new))
    return printed


def run_diff(page: Path, block: Block, *, quick: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the program before a diff and the one after it, each with seed 0 and a store of its own.

    :param quick: whether both are run shortened, if the block says how.
    :return: the names that each of them has defined.
    """
    import pyro

    before, after = ({"__name__": page.stem} for _ in range(2))
    programs = sides(block.shortened() if quick else block.code)
    for code, namespace in zip(programs, (before, after), strict=True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        _run(code, page, block.line, namespace)
    return before, after


def _run(code: str, page: Path, line: int, namespace: dict[str, Any]) -> str:
    # Empty lines before it, so that a traceback gives the line of the page.
    program = compile("\n" * line + code, str(page), "exec")
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        exec(program, namespace)
    return text.getvalue()


def _figures() -> set[int]:
    """Return the numbers of the figures that are open."""
    plt = sys.modules.get("matplotlib.pyplot")
    return set(plt.get_fignums()) if plt is not None else set()
