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

extensions = ["myst_parser", "sphinx.ext.autodoc", "mathml"]
exclude_patterns = ["_build", "figures"]  # parts of pages lie in figures/gallery
# Single backticks in docstrings stand for code, as in Markdown.
default_role = "literal"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
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
]

html_theme = "furo"
html_title = "pyro_adaann"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"
