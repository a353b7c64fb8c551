"""The direction of imports, and what importing the package must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_adaann

PACKAGE = Path(pyro_adaann.__file__).parent
#: What each module may import of the package, and whether it may import Pyro.
ALLOWED = {
    "version": (set(), False),
    "schedules": (set(), False),
    "fixed_schedules": ({"schedules"}, False),
    "endings": ({"schedules"}, False),
    "cess_schedule": ({"schedules"}, False),
    "stage_rules": (set(), False),
    "results": (set(), False),
    "transforms.base": (set(), True),
    "transforms.planar": ({"transforms.base"}, True),
    "transforms.realnvp": ({"transforms.base"}, True),
    "guides": ({"transforms"}, True),
    "paths": (set(), False),
    "tempering": ({"paths"}, True),
    "particles": ({"tempering"}, True),
    "scores": ({"particles", "tempering"}, True),
    "broken": ({"particles", "scores", "tempering"}, True),
    "mixed_kl": ({"particles", "scores"}, True),
    "natural_kl": ({"mixed_kl", "parameters", "particles", "scores"}, True),
    "ladder": ({"results"}, False),
    "lost_modes": (
        {"draws", "importance", "ladder", "particles", "svi", "tempering"},
        False,
    ),
    "mixture": ({"draws", "importance", "ladder", "svi"}, False),
    "recovery": ({"parameters", "results"}, False),
    "objective": ({"broken", "mixed_kl", "natural_kl", "particles", "schedules", "tempering"}, True),
    "parameters": (set(), True),
    "interrupt": (set(), False),
    "checkpoint": (set(), False),
    "budget": ({"results", "schedules"}, False),
    "progress": ({"budget", "results", "schedules"}, False),
    "checks": (
        {"ladder", "mixed_kl", "natural_kl", "particles", "schedules", "stage_rules", "tempering"},
        True,
    ),
    "resume": (
        {"checkpoint", "mixed_kl", "natural_kl", "objective", "parameters", "results", "version"},
        True,
    ),
    "svi": (
        {
            "budget",
            "checkpoint",
            "checks",
            "endings",
            "interrupt",
            "ladder",
            "objective",
            "parameters",
            "progress",
            "recovery",
            "results",
            "resume",
            "schedules",
            "stage_rules",
            "tempering",
        },
        True,
    ),
    "presets": ({"cess_schedule", "ladder", "natural_kl", "stage_rules", "svi"}, True),
    "fits": ({"particles"}, True),
    "draws": ({"broken", "fits", "particles", "scores", "tempering"}, True),
    "importance": ({"draws", "fits"}, False),
    "thermodynamic": ({"draws", "importance", "particles", "results", "tempering"}, False),
    "diagnosis": ({"importance", "lost_modes", "thermodynamic"}, False),
    "diagnostics": (
        {"diagnosis", "draws", "fits", "importance", "lost_modes", "svi", "tempering", "thermodynamic"},
        False,
    ),
    "pointwise": ({"draws", "particles"}, False),
    "arviz_groups": ({"draws", "particles", "pointwise"}, True),
    "io_arviz": (
        {
            "arviz_groups",
            "diagnostics",
            "draws",
            "fits",
            "importance",
            "lost_modes",
            "results",
            "svi",
            "version",
        },
        True,
    ),
    "plots": ({"results"}, False),
}
#: Heavy libraries that only functions may import.
LAZY = {"arviz", "arviz_base", "arviz_stats", "matplotlib", "xarray"}


def modules() -> list[str]:
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]
    return [name for name in names if not name.endswith("__init__")]


def imported(node: ast.AST) -> set[str]:
    names = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "absolute imports only"
            names.add(child.module or "")
    return names


def test_every_module_is_in_the_table():
    assert set(modules()) <= set(ALLOWED)


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name):
    tree = ast.parse((PACKAGE / (name.replace(".", "/") + ".py")).read_text())
    siblings, may_use_pyro = ALLOWED[name]
    for module in imported(tree):
        root = module.split(".")[0]
        if root == "pyro_adaann":
            assert module.removeprefix("pyro_adaann.") in siblings, module
        assert root != "pyro" or may_use_pyro, module
    top_level = {
        module
        for statement in tree.body
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for module in imported(statement)
    }
    assert not {module.split(".")[0] for module in top_level} & LAZY


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_exports(name):
    tree = ast.parse((PACKAGE / (name.replace(".", "/") + ".py")).read_text())
    assert ast.get_docstring(tree)
    assert name == "version" or any(
        isinstance(s, ast.Assign) and getattr(s.targets[0], "id", "") == "__all__" for s in tree.body
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
heavy = {"arviz", "arviz_base", "matplotlib", "xarray"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_changes_nothing_and_loads_nothing_heavy():
    subprocess.run([sys.executable, "-c", IMPORT], check=True, cwd=PACKAGE.parent)
