"""Coloured text as PDF: typeset by LaTeX where it is installed and has the letters, otherwise drawn by matplotlib.

Words are text, never markup: they are escaped here, so that a token can neither break the document nor run a command.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lxt.show import colors
from lxt.show.files import write
from lxt.show.pages import Block, text_pages
from lxt.show.rows import rows, unit
from lxt.show.words import amount, shorten

if TYPE_CHECKING:
    from lxt.attribution import Attribution

__all__ = ["BACKENDS", "attribution_pdf", "escape", "text_pdf", "unescape"]

BACKENDS = ("xelatex", "pdflatex")
_SECONDS = 120  # a first run builds font caches
_WORDS = 3000  # one block is one page, and TeX's longest is 5.7 metres
_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {"\\": "\\textbackslash{}"}
_SET = _ESCAPES | {
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "'": "\\textquotesingle{}",
    "`": "\\textasciigrave{}",
    '"': "\\textquotedbl{}",
    **{character: f"{{{character}}}" for character in "-<>,"},  # two in a row would become one ligature
    "⏎": "\\(\\hookleftarrow\\)",
    "⇥": "\\(\\mapsto\\)",
    "␣": "\\textvisiblespace{}",
    "−": "\\(-\\)",
    "·": "\\textperiodcentered{}",
    "Σ": "\\(\\Sigma\\)",
    "∅": "\\(\\emptyset\\)",
    "…": "\\ldots{}",
    "⟨": "\\(\\langle\\)",
    "⟩": "\\(\\rangle\\)",
}
_ESCAPED = re.compile(r"\\textbackslash\{\}|\\([&%$#_{}\\])")


def escape(text: str) -> str:
    """Text with LaTeX's ten special characters, less `~` and `^`, escaped: what `clean_tokens` does."""
    return "".join(_ESCAPES.get(character, character) for character in text)


def unescape(text: str) -> str:
    """The text behind `escape`; text that was never escaped passes through."""
    return _ESCAPED.sub(lambda match: match[1] or "\\", text)


def attribution_pdf(attribution: Attribution, path: str | os.PathLike[str], special: bool, scale_special: bool) -> None:
    """Write the rows of an Attribution, each on a page of its own; options as in `Attribution.show`."""
    blocks = []
    for row in rows(attribution, special, scale_special):
        words = []
        for token, fraction, muted in zip(row.tokens, row.fractions, row.muted, strict=True):
            background = None if muted or not fraction else colors.diverging(fraction)
            words.append((shorten(token or "∅") + ("\n" if "\n" in token else ""), background))
        head = [f"What speaks for {row.target}?   {row.value}"]
        head += [f"model {shorten(row.model)}, rules {shorten(row.rules)}"]
        foot = [f"predicts {row.predicted}"] if row.predicted else []
        foot += [f"red raises, blue lowers: full colour is {amount(row.scale)} {unit(row.explained.kind)}"]
        foot += [row.places_asked] if row.places_asked else []
        foot += [row.conserved, *([row.note] if row.note else [])]
        blocks.append(Block(words, head, foot))
    backend = next((name for name in BACKENDS if shutil.which(name)), None)
    text_pdf(blocks, path, backend)


def text_pdf(
    blocks: Sequence[Block], path: str | os.PathLike[str], backend: str | None, delete_aux_files: bool = True
) -> None:
    """Write blocks of coloured text as PDF.

    Args:
        blocks: each becomes a page (matplotlib continues a long one on further pages).
        path: of the PDF.
        backend: the LaTeX program to try first; None draws with matplotlib.
        delete_aux_files: False leaves LaTeX's source and log beside the PDF.
    """
    content = None
    if backend is not None and shutil.which(backend) and all(_settable(block, backend) for block in blocks):
        content = _compile(_document(blocks), Path(path), backend, delete_aux_files)
    write(path, text_pages(blocks) if content is None else content)


def _settable(block: Block, backend: str) -> bool:
    """Whether LaTeX's own fonts have every letter: what they lack they would drop without a word."""
    last = "\u017f" if backend == "xelatex" else "\u00ff"
    text = "".join([*(word for word, _ in block.words), *block.head, *block.foot])
    letters = all(" " <= c < "\x7f" or "\u00a1" <= c <= last or c in _SET or c == "\n" for c in text)
    return letters and len(block.words) <= _WORDS


def _set(text: str) -> str:
    return "".join(_SET.get(character, character) for character in text)


def _document(blocks: Sequence[Block]) -> str:
    pages = []
    for block in blocks:
        head = "".join(rf"{{{_set(line)}\par}}\smallskip" + "\n" for line in block.head)
        foot = "".join(rf"{{\small {_set(line)}\par}}" + "\n" for line in block.foot)
        words = "".join(_word(word, background) for word, background in block.words)
        pages.append(_PAGE.replace("CONTENT", f"{head}{words}\\par\\smallskip\n{foot}"))
    return _PREAMBLE + "".join(pages) + "\\end{document}\n"


def _word(word: str, background: colors.RGB | None) -> str:
    text = word.rstrip("\n")
    core = text.lstrip(" ") or text.replace(" ", "\xa0")
    spaces = "\\ " * (len(text) - len(core))  # TeX drops plain ones at the start of a line
    inside = rf"\strut {_set(core).replace(chr(0xA0), '~')}"
    box = rf"\mbox{{{inside}}}" if background is None else _box(background, inside)
    return f"{spaces}{box}\\allowbreak{{}}" + ("\\\\\n" if word.endswith("\n") else "%\n")


def _box(background: colors.RGB, inside: str) -> str:
    red, green, blue = background
    ink = "white" if sum(colors.ink(background)) > 380 else "black"
    return rf"\colorbox[RGB]{{{red},{green},{blue}}}{{\color{{{ink}}}{inside}}}"


# A page is cut around each block; \pdfpagewidth is known to pdfTeX and to XeTeX.
_PREAMBLE = r"""\documentclass{article}
\usepackage{iftex}
\ifPDFTeX\usepackage[T1]{fontenc}\fi
\usepackage{xcolor}
\begin{document}
\hoffset=-1in \voffset=-1in \parindent=0pt \fboxsep=0.8pt \raggedright
\large\sffamily \spaceskip=0.42em plus 0.1em
"""
_PAGE = r"""\setbox0=\vbox{\hsize=165mm \textwidth=\hsize \linewidth=\hsize \baselineskip=19pt
CONTENT}%
\pdfpagewidth=\dimexpr\wd0+16mm\relax \pdfpageheight=\dimexpr\ht0+\dp0+16mm\relax
\shipout\vbox{\kern8mm\hbox{\kern8mm\box0}}
"""


def _compile(source: str, path: Path, backend: str, delete_aux_files: bool) -> bytes | None:
    """The PDF, or None with a warning where LaTeX fails."""
    command = [backend, "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "text.tex"]
    with tempfile.TemporaryDirectory(prefix="lxt-") as folder:
        Path(folder, "text.tex").write_text(source, encoding="utf-8")
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, timeout=_SECONDS, check=False)
            said = run.stdout.decode("utf-8", "replace").splitlines()
            reason = next((line for line in said if line.startswith("!")), f"exit status {run.returncode}")
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = str(error)
        if not delete_aux_files:
            for suffix in (".tex", ".log", ".aux"):
                if Path(folder, f"text{suffix}").exists():
                    write(path.with_suffix(suffix), Path(folder, f"text{suffix}").read_bytes())
        made = Path(folder, "text.pdf")
        if made.exists() and made.stat().st_size:
            return made.read_bytes()
    warnings.warn(f"{backend} failed ({reason}); drew the PDF with matplotlib instead", RuntimeWarning, stacklevel=4)
    return None
