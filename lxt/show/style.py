"""The style sheet of the HTML views. Scores are classes: `p1` to `p20` raise, `n1` to `n20` lower."""

from __future__ import annotations

from lxt.show import colors

__all__ = ["PAGE", "STEPS", "fragment", "shade"]

STEPS = 20  # colours on each side; more can't be told apart

_SHEET = """
.lxt{--page:#fff;--text:#16181d;--muted:#5a616c;--line:#dfe2e7;--soft:#f5f6f8;background:var(--page);
color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
color-scheme:light dark}
.lxt *{box-sizing:border-box}
.lxt section{padding:0 0 2.5rem}.lxt section+section{border-top:1px solid var(--line);padding-top:2rem}
.lxt h2{font-size:1.25rem;line-height:1.35;font-weight:650;margin:0 0 .15rem;overflow-wrap:anywhere}
.lxt h3{font-size:.8rem;font-weight:650;letter-spacing:.04em;text-transform:uppercase;
color:var(--muted);margin:1.9rem 0 .6rem}
.lxt h2 small{font-weight:400;font-size:1rem;color:var(--muted);margin-left:.4em;white-space:nowrap}
.lxt p{margin:.15rem 0;overflow-wrap:anywhere}.lxt .quiet{color:var(--muted)}
.lxt .text{font-size:1.3rem;line-height:1.85;margin:1.1rem 0 .9rem;white-space:pre-wrap;overflow-wrap:anywhere;
unicode-bidi:isolate;max-width:64rem}
.lxt .t{position:relative;padding:.18em .03em;border-radius:.22em;box-decoration-break:clone;
-webkit-box-decoration-break:clone}
.lxt .s{font-size:.72em;color:var(--muted);border:1px dashed var(--line)}
.lxt .at{text-decoration:underline 3px;text-underline-offset:.2em}
.lxt .t:hover{outline:2px solid var(--muted)}
.lxt .t:focus-visible{outline:3px solid var(--text);outline-offset:1px;z-index:2}
.lxt .t:focus-visible::after{content:attr(title);position:absolute;left:0;top:115%;background:var(--text);
color:var(--page);font:13px/1.4 system-ui,sans-serif;padding:.25em .6em;border-radius:.3em;
white-space:nowrap;z-index:3;direction:ltr}
.lxt .key{display:flex;flex-wrap:wrap;gap:.1rem .7rem;align-items:center;font-size:.85rem;color:var(--muted)}
.lxt .bar{display:inline-flex;height:.8rem;width:13rem;border-radius:.2rem;overflow:hidden;border:1px solid var(--line)}
.lxt .bar i{flex:1}
.lxt table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.lxt td,.lxt th{padding:.16rem .8rem .16rem 0;text-align:left;font-weight:400;vertical-align:middle}
.lxt th{color:var(--muted);font-size:.85rem}
.lxt .num{text-align:right}.lxt .tok{font-weight:600;overflow-wrap:anywhere;max-width:24rem}
.lxt .grid td,.lxt .grid th{white-space:nowrap;padding:.16rem .45rem;border-radius:.2rem}
.lxt [data-gap]{border-left:2px solid var(--muted)}
.lxt .rank svg{display:block}
.lxt .scroll{overflow-x:auto;max-width:100%}
.lxt svg text{fill:var(--text);font-size:11px;font-family:inherit;unicode-bidi:isolate}
.lxt svg .m{fill:var(--soft)}.lxt svg .g{fill:var(--page);stroke:var(--soft)}
.lxt details{margin-top:1.2rem}.lxt summary{cursor:pointer;color:var(--muted);font-size:.9rem}
.lxt .images{display:flex;flex-wrap:wrap;gap:1rem}.lxt figure{margin:0;max-width:100%}
.lxt figcaption{font-size:.8rem;margin-top:.2rem}.lxt figure svg{max-width:100%;height:auto;display:block}
.lxt nav ol{padding-left:1.5rem;margin:0 0 2rem}.lxt a{color:inherit}
.lxt footer{color:var(--muted);font-size:.8rem;border-top:1px solid var(--line);padding-top:.8rem;
overflow-wrap:anywhere}
"""
_DARK = ".lxt{--page:#17191e;--text:#eceef2;--muted:#a3abb8;--line:#343942;--soft:#22252c}"
PAGE = """
html{background:#fff}body{margin:0}body.lxt{padding:1.6rem clamp(1rem,4vw,3.5rem);min-height:100vh}
body.lxt>header{margin-bottom:1.6rem;font-size:.9rem;color:var(--muted)}body.lxt main{max-width:76rem}
@media (prefers-color-scheme:dark){html{background:#17191e}}
"""


def fragment() -> str:
    """The rules for everything inside an element of class `lxt`, for light and dark."""
    return f"{_SHEET}{_classes(colors.LIGHT)}@media (prefers-color-scheme:dark){{{_DARK}{_classes(colors.DARK)}}}\n"


def shade(fraction: float) -> str:
    """The class of a score that is `fraction` of the scale; none where it would not be seen."""
    step = min(STEPS, round(abs(fraction) * STEPS))
    return "" if step == 0 else f"{'p' if fraction > 0 else 'n'}{step}"


def _classes(theme: colors.Theme) -> str:
    out = []
    for step in range(1, STEPS + 1):
        for name, sign in (("p", 1), ("n", -1)):
            color = colors.diverging(sign * step / STEPS, theme)
            fill, ink = colors.css(color), colors.css(colors.ink(color))
            out.append(f".lxt .{name}{step}{{background:{fill};fill:{fill};color:{ink}}}")
    return "\n".join(out)
