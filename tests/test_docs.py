"""README and documentation: programs run, links lead somewhere, public names are described."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib as mpl
import pytest

import pyro_adaann

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

mpl.use("Agg")
plt = importlib.import_module("matplotlib.pyplot")


def load(name: str) -> ModuleType:
    """Import a module of ``docs/``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pages = load("pages")
PROGRAMS = [page for page in pages.PAGES if any(b.language == "python" for b in pages.blocks(page))]
SLOW = [page for page in PROGRAMS if any(b.reason or b.quick for b in pages.blocks(page))]
DIFFS = [(page, block) for page in pages.PAGES for block in pages.blocks(page) if block.language == "diff"]
QUICK_DIFFS = [(page, block) for page, block in DIFFS if not block.reason]
SLOW_DIFFS = [(page, block) for page, block in DIFFS if block.reason or block.quick]


def name_of(value: Any) -> str:
    return value.stem if isinstance(value, Path) else f"line-{value.line}"


# --- programs ------------------------------------------------------------------------------------------


# Pyro says so where a trajectory has overflowed, and the page says what that means.
overflows = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")


@overflows
@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_programs_of_a_page_run_one_after_the_other(page):
    pages.run_page(page, quick=True)
    plt.close("all")


@overflows
@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_slow_programs_of_a_page_run_in_full(page):
    pages.run_page(page, slow=True)
    plt.close("all")


@pytest.mark.parametrize(("page", "block"), QUICK_DIFFS, ids=name_of)
def test_both_sides_of_a_diff_run(page, block):
    pages.run_diff(page, block, quick=True)


@overflows
@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), SLOW_DIFFS, ids=name_of)
def test_both_sides_of_a_slow_diff_run_in_full(page, block):
    pages.run_diff(page, block)


def test_a_program_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\na = 1\n```\n\n```python\nassert a == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        pages.run_page(page)
    assert failure.traceback[-1].lineno == 7  # of the page, counted from 0


def test_a_program_is_shortened_where_it_says_so_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python name=x quick: 10 -> 2; b = 3 -> b = 4\na = 10\nb = 3\nprint(a, b)\n```\n")
    (block,) = pages.blocks(page)
    assert block.name == "x"
    assert block.shortened() == "a = 2\nb = 4\nprint(a, b)\n"
    page.write_text("```python quick: 10 -> 2\na = 11\n```\n")
    with pytest.raises(ValueError, match="Expected '10' once in the block at line 1; got 0"):
        pages.run_page(page, quick=True)


def test_every_block_is_python_diff_or_shell():
    for page in pages.PAGES:
        for language in re.findall(r"^```(\w+)", page.read_text(), flags=re.MULTILINE):
            assert language in ("python", "diff", "bash"), (page, language)


def test_what_a_page_includes_is_what_its_programs_print():
    """Kept outputs and programs have the same names: none is forgotten, none is left over."""
    # The page of the paper's examples is made as a whole, from result files (`benchmarks/paper/report.py`).
    for page in set(DOCS.glob("*.md")) - {DOCS / "paper.md"}:
        named = [b.name for b in pages.blocks(page) if b.name and b.language == "python"]
        names = {f"figures/{page.stem}_{name}" for name in named}
        shown = re.findall(rf"figures/{page.stem}_\w+(?=\.(?:txt|png))", page.read_text())
        assert names == set(shown), page


# --- links ---------------------------------------------------------------------------------------------


def links(page: Path) -> Iterator[str]:
    """Yield what a page links to and includes, other sites left out."""
    text = re.sub(r"^```(python|diff|bash).*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    yield from re.findall(r"^```\{(?:literal)?include\} (\S+)", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that headings make, and the labels that are set by hand."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\((\S+)\)=$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", pages.PAGES, ids=name_of)
def test_links_within_the_repository_hold(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_description_of_the_package_leads_nowhere_within_the_repository():
    assert not list(links(ROOT / "PACKAGE.md"))


def test_every_figure_is_shown_and_every_page_is_in_the_contents():
    text = "".join(page.read_text() for page in [*pages.PAGES, *(DOCS / "figures").rglob("*.md")])
    for figure in (DOCS / "figures").rglob("*.*"):
        assert figure.name in text, f"{figure} is on no page"
    contents = (DOCS / "index.md").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or re.search(rf"^{page.stem}$", contents, flags=re.MULTILINE), page


def test_the_gallery_shows_every_example():
    gallery = (DOCS / "gallery.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        if "__main__" in script.read_text():  # the others are parts of these
            assert f"figures/gallery/{script.stem}.md" in gallery, script


# --- names ---------------------------------------------------------------------------------------------

#: Public names with neither text nor example of their own, and where these are.
DATA = {"BRIDGE", "JOINT", "KL_WARMUP", "LIKELIHOOD", "__version__"}
#: Names whose example stands elsewhere, and where.
EXAMPLE_ELSEWHERE = {"AnnealingSchedule": "extend.md", "AutoFlow": "extend.md"}
#: Arguments that the text of the class or function describes in other words.
NOT_ARGUMENTS = {"self", "args", "kwargs"}


def public_objects() -> dict[str, Any]:
    """Return every public function and class by name, those of `plots` included."""
    found = {name: getattr(pyro_adaann, name) for name in pyro_adaann.__all__ if name not in DATA}
    plots = found.pop("plots")
    return {**found, **{f"plots.{name}": getattr(plots, name) for name in plots.__all__}}


@pytest.mark.parametrize("name", public_objects())
def test_every_public_name_has_a_sentence_and_an_example(name):
    text = inspect.getdoc(public_objects()[name]) or ""
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith((".", ":")), f"{name}: the first paragraph is no sentence: {first!r}"
    if name in EXAMPLE_ELSEWHERE:
        assert name in (DOCS / EXAMPLE_ELSEWHERE[name]).read_text()
    else:
        assert "Example::" in text, f"{name} has no example"
        assert ">>>" in text


@pytest.mark.parametrize("name", public_objects())
def test_every_argument_is_described(name):
    value = public_objects()[name]
    text = inspect.getdoc(value) or ""
    described = set(re.findall(r":param (\w+):", text)) | set(re.findall(r"``(\w+)``", text))
    source = inspect.getsource(sys.modules[value.__module__])
    for argument in inspect.signature(value).parameters:
        if argument in NOT_ARGUMENTS:
            continue
        # A field of a record may be described by the comment above it.
        is_field = re.search(rf"#:.*\n(?:    #:.*\n)*(?:    \w+: .*\n)*    {argument}: ", source)
        assert argument in described or is_field, f"{name}: {argument}"


@pytest.mark.parametrize("name", public_objects())
def test_every_public_method_says_what_it_does(name):
    value = public_objects()[name]
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        if attribute.startswith("_") or not (callable(member) or isinstance(member, property)):
            continue
        inherited = any(hasattr(getattr(base, attribute, None), "__doc__") for base in value.__mro__[1:])
        assert inspect.getdoc(member) or inherited, f"{name}.{attribute} has no text"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    for name in pyro_adaann.__all__:
        assert re.search(rf"(?:::|paths\.|adaann\.|`).*\b{name}\b", text), name


# --- error messages ------------------------------------------------------------------------------------


@functools.cache
def messages() -> list[str]:
    """Return all strings of the package, with ``{}`` for what is put into them."""
    found = []
    for path in Path(pyro_adaann.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize(
    "quoted", re.findall(r'^### "(.*)"$', (DOCS / "faq.md").read_text(), flags=re.MULTILINE)
)
def test_every_quoted_message_exists(quoted):
    parts = [re.escape(part) for part in re.split(r"\s*\.\.\.\s*", quoted.rstrip(",;")) if part.strip(",; ")]
    pattern = re.compile(".*?".join(parts), flags=re.DOTALL)
    assert any(pattern.search(message) for message in messages()), quoted
