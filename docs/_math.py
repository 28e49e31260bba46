"""MkDocs hook: equations become MathML while the pages are built, with no need for JavaScript or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves behind: \(...\) in a span, \[...\] in a div.
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""
    return _EQUATION.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, latex = match.groups()
    equation = convert(html.unescape(latex).strip(), display="block" if tag == "div" else "inline")
    return f'<{tag} class="equation">{equation}</{tag}>'
