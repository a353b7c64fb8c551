"""Settings of the documentation: ``sphinx-build -W --keep-going -n docs docs/_build``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pyro_adaann.version import __version__

project = "pyro_adaann"
author = "The pyro_adaann developers"
copyright = author
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "mathml",
]
exclude_patterns = ["_build", "figures"]  # parts of pages lie in figures/gallery
# Kept inventories, in Sphinx's plain format, of the names that the pages link to: a build asks no network.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable", "inventories/torch.txt"),
    "pyro": ("https://docs.pyro.ai/en/stable", "inventories/pyro.txt"),
    "arviz": ("https://python.arviz.org/en/stable", "inventories/arviz.txt"),
}
# Notebooks run in every build, and a cell that fails ends it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # hints about widgets, which depend on the machine
# Single backticks in docstrings stand for code, as in Markdown.
default_role = "literal"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "substitution"]
myst_substitutions = {"version": __version__}
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_type_aliases = {"Fit": "Fit"}
autodoc_default_options: dict[str, Any] = {"members": True}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# Types of other packages have no page here.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|pyro|matplotlib|collections|datetime|os|Any|Axes|Tensor|Size|nn)(\..*)?"),
    (r"py:.*", r"(Path|Fit|Literal|optional|ABC|abc\..*)"),
]

nitpick_ignore = [
    ("py:func", "standard_deviation"),  # is in the reference under its module's name
    ("py:class", "pyro_adaann.diagnostics.rules.Finding"),  # a part of a verdict, described with it
    ("py:class", "pyro_adaann.diagnostics.opinion.AnnealedDraws"),  # what a result of AnnealedSMC is there
]

# Annotations have the names that modules import; the inventories have full ones.
FULL_NAMES = {
    "Tensor": "torch.Tensor",
    "nn.Module": "torch.nn.Module",
    "PyroOptim": "pyro.optim.optim.PyroOptim",
    "SVI": "pyro.infer.svi.SVI",
    "ELBO": "pyro.infer.elbo.ELBO",
    "pyro.infer.SVI": "pyro.infer.svi.SVI",
    "pyro.infer.Trace_ELBO": "pyro.infer.trace_elbo.Trace_ELBO",
}


def setup(app: Any) -> None:
    """Give references their full names before the inventories are searched."""

    def complete(app: Any, env: Any, node: Any, contnode: Any) -> None:
        node["reftarget"] = FULL_NAMES.get(node["reftarget"], node["reftarget"])

    app.connect("missing-reference", complete, priority=100)


html_theme = "furo"
html_title = "pyro_adaann"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
