"""A Sphinx extension: formulas as MathML, which browsers draw themselves.

No script and no network are needed to read them, and no LaTeX to build them: docutils, on which Sphinx
stands, brings the converter. A formula that it cannot read is an error of the build. The font comes with
the site (``_static``), since few systems have one with the measures that formulas need.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)

_FUNCTION = r"\\(log|exp|tanh|cos|sin|det)"
#: What TeX reads otherwise than docutils' converter, and how to tell it.
_READINGS = [
    (re.compile(r"\\dots\b"), r"\\ldots"),
    # Two digits are two arguments: \tfrac12 is a half, and not twelve over what follows.
    (re.compile(r"\\([td]?frac)\s*(\d)(\d)"), r"\\\1{\2}{\3}"),
    # A thin space after the name of a function, unless a bracket or a script follows.
    (re.compile(_FUNCTION + r"\b(?!\s*(?:[_^(\[{|]|\\[Bb]ig|\\left))\s*"), r"\\\1\\,"),
    # And before it, where a letter or a bracket comes first.
    (re.compile(r"(?<=[\w)}\]]) ?" + _FUNCTION + r"\b"), r"\\,\\\1"),
]


def convert(node: nodes.Element, *, as_block: bool) -> str:
    """Return the MathML of a formula; log an error and return its source if it cannot be read."""
    source = node.astext()
    for pattern, reading in _READINGS:
        source = pattern.sub(reading, source)
    try:
        return tex2mathml(source, as_block=as_block)
    except MathError as error:
        _logger.warning("formula %r: %s", source, error, location=node)
        return f"<code>{source}</code>"


def visit_inline(translator: Any, node: nodes.Element) -> None:
    """Write a formula in a line of text."""
    translator.body.append(convert(node, as_block=False))
    raise nodes.SkipNode


def visit_display(translator: Any, node: nodes.Element) -> None:
    """Write a formula on its own."""
    translator.body.append(f'<div class="formula">{convert(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
