"""The direction of imports, and what importing the package must not do."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_adaann

PACKAGE = Path(pyro_adaann.__file__).parent
#: From the floor to the roof: a module imports from its own layer and from those below it.
LAYERS = [
    {"version", "checks", "guide_status", "weights", "processes"},
    {"transforms"},
    {"guides"},
    {"annealing"},
    {"objectives"},
    {"steps"},
    {"state"},
    {"runs", "svi", "natural"},
    {"diagnostics"},
    {"sampling"},
    {"nested"},
    {"export", "fitting"},
    {"testing"},
]
#: Heavy libraries that only functions may import.
LAZY = {"arviz", "arviz_base", "arviz_stats", "matplotlib", "xarray"}


def modules() -> list[str]:
    return sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def layer(name: str) -> int:
    """Return the layer of a module, by the name of its room."""
    room = name.split(".")[0]
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


def imported(node: ast.AST) -> set[str]:
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "absolute imports only"
            names.add(child.module or "")
    return names


@pytest.mark.parametrize("name", [name for name in modules() if name != "__init__"])
def test_imports_run_downwards(name):
    tree = ast.parse((PACKAGE / (name.replace(".", "/") + ".py")).read_text())
    for module in imported(tree):
        if module.split(".")[0] == "pyro_adaann":
            below = module.removeprefix("pyro_adaann.")
            assert layer(below) <= layer(name), f"{name} imports {module}, which lives above it"
    top_level = {
        module
        for statement in tree.body
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for module in imported(statement)
    }
    assert not {module.split(".")[0] for module in top_level} & LAZY


def imports_of(name: str) -> set[str]:
    tree = ast.parse((PACKAGE / (name.replace(".", "/") + ".py")).read_text())
    found = {m.removeprefix("pyro_adaann.") for m in imported(tree) if m.startswith("pyro_adaann.")}
    return found & set(modules())


def test_no_two_modules_import_each_other():
    order = graphlib.TopologicalSorter(
        {name: imports_of(name) for name in modules() if "__init__" not in name}
    )
    order.prepare()  # raises with the cycle


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_exports(name):
    tree = ast.parse((PACKAGE / (name.replace(".", "/") + ".py")).read_text())
    assert ast.get_docstring(tree)
    assert (
        name in ("version",)
        or name.endswith("__init__")
        or any(isinstance(s, ast.Assign) and getattr(s.targets[0], "id", "") == "__all__" for s in tree.body)
    )


def test_every_public_name_has_a_docstring():
    for name in pyro_adaann.__all__:
        value = getattr(pyro_adaann, name)
        if callable(value):
            assert value.__doc__, name


IMPORT = """
import torch, logging, pyro, sys
from torch.distributions import Distribution
def state():
    return (torch.get_default_dtype(), Distribution._validate_args, pyro.settings.get(),
            torch.get_rng_state().sum().item(), logging.getLogger().level,
            len(logging.getLogger().handlers), list(pyro.get_param_store()))
before = state()
import pyro_adaann
assert state() == before, (before, state())
heavy = {"arviz", "arviz_base", "matplotlib", "xarray", "triton"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_changes_nothing_and_loads_nothing_heavy():
    subprocess.run([sys.executable, "-c", IMPORT], check=True, cwd=PACKAGE.parent)
