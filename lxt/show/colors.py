"""Colours of the views: one diverging scale, red raises and blue lowers the explained value.

Red against blue stays apart in every common colour-blindness. Steps are taken in OKLab (Ottosson 2020), where equal
steps look equal, so that a token twice as relevant looks twice as strong. Text on a colour is always the one of two
inks with the better WCAG contrast.
"""

from __future__ import annotations

__all__ = ["DARK", "LIGHT", "RGB", "Theme", "contrast", "css", "diverging", "ink", "luminance", "terminal", "weak"]

RGB = tuple[int, int, int]
Theme = tuple[RGB, RGB, RGB]  # neutral (the page), positive end, negative end

LIGHT: Theme = ((255, 255, 255), (190, 20, 40), (20, 85, 185))
DARK: Theme = ((23, 25, 30), (255, 112, 96), (96, 168, 255))
_TERMINAL: Theme = ((110, 110, 113), (200, 24, 38), (26, 92, 214))  # readable on black and on white alike
_INKS: tuple[RGB, RGB] = ((4, 4, 6), (255, 255, 255))  # one of them has a contrast of 4.5 on any colour


def luminance(color: RGB) -> float:
    """Relative luminance of WCAG 2, 0 for black to 1 for white."""
    red, green, blue = (_linear(part) for part in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: RGB, other: RGB) -> float:
    """Contrast ratio of WCAG 2, 1 to 21; 4.5 is readable text."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink(background: RGB) -> RGB:
    """The text colour that reads best on a background."""
    return max(_INKS, key=lambda color: contrast(color, background))


def diverging(fraction: float, theme: Theme = LIGHT) -> RGB:
    """The colour of a score: `fraction` in [-1, 1] is its share of the scale's end; beyond is clipped."""
    neutral, positive, negative = theme
    return _mix(neutral, positive if fraction >= 0 else negative, min(1.0, abs(fraction)))


def terminal(fraction: float) -> RGB:
    """The same scale for a terminal, whose background nobody knows: from grey, never near black or white."""
    return diverging(fraction, _TERMINAL)


def weak(fraction: float) -> RGB:
    """The letters of a weak score on a terminal's own background, readable on black and on white."""
    return (214, 78, 74) if fraction > 0 else (66, 126, 214)


def css(color: RGB) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def _linear(part: int) -> float:
    share = part / 255
    return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4


def _mix(start: RGB, end: RGB, share: float) -> RGB:
    one, other = _oklab(start), _oklab(end)
    return _rgb(tuple(a + (b - a) * share for a, b in zip(one, other, strict=True)))  # type: ignore[arg-type]


def _cbrt(value: float) -> float:
    return value ** (1 / 3)  # of light, which is never negative; math.cbrt came with Python 3.11


def _oklab(color: RGB) -> tuple[float, float, float]:
    red, green, blue = (_linear(part) for part in color)
    long = _cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue)
    medium = _cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue)
    short = _cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _rgb(lab: tuple[float, float, float]) -> RGB:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    parts = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (round(255 * _gamma(min(1.0, max(0.0, part)))) for part in parts)
    return red, green, blue


def _gamma(share: float) -> float:
    return 12.92 * share if share <= 0.0031308 else 1.055 * share ** (1 / 2.4) - 0.055
