"""Layers over time as a picture: one row for each layer, one column for each reading.

Drawn with Pillow, which TensorBoard needs for images anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CELL = 14
"""Height of a row, in pixels."""

WIDE = 640
"""Width of the readings, about, in pixels."""

_STOPS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)  # dark to light, as in matplotlib's viridis
_NOTHING = (200, 200, 200)


def colours(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(…,) → (…, 3) uint8, from dark at `low` to light at `high`; grey where there is no number."""
    span = high - low
    share = np.clip((values - low) / span, 0, 1) if span > 0 else np.full(values.shape, 0.5)
    place = np.nan_to_num(share) * (len(_STOPS) - 1)
    below = np.minimum(place.astype(int), len(_STOPS) - 2)
    part = (place - below)[..., None]
    found = (_STOPS[below] * (1 - part) + _STOPS[below + 1] * part).round().astype(np.uint8)
    found[~np.isfinite(values)] = _NOTHING
    return found


def heat_map(title: str, layers: Sequence[str], steps: Sequence[int], values: np.ndarray, *, log: bool = False) -> Any:
    """A picture (height, width, 3) uint8 of `values` (layers, steps), with names, steps and a scale.

    Args:
        log: colours by the logarithm, for values over several powers of ten; what is not positive is then grey.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    if log:
        values = np.where(values > 0, values, np.nan)
    shown = np.log10(values) if log else values
    finite = shown[np.isfinite(shown)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    names = shortened(layers)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = int(max((measure.textlength(name, font=font) for name in names), default=0)) + 12
    cell = max(1, min(48, WIDE // max(1, len(steps))))
    top, bottom, right = 26, 24, 96
    across, down = cell * len(steps), CELL * len(layers)
    width = max(left + max(across, 120) + right, int(measure.textlength(title, font=font)) + 16)
    picture = Image.new("RGB", (width, top + max(down, 80) + bottom), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 6), title, fill="black", font=font)
    if steps and layers:
        cells = Image.fromarray(colours(shown, low, high)).resize((across, down), Image.Resampling.NEAREST)
        picture.paste(cells, (left, top))
    for i, name in enumerate(names):
        draw.text((left - 6, top + i * CELL + CELL // 2), name, fill="black", font=font, anchor="rm")
    last = -math.inf
    for i, step in enumerate(steps):
        x = left + i * cell + cell // 2
        if x - last >= 52 or (i + 1 == len(steps) and x - last >= 36):
            draw.text((x, top + down + 4), f"{step:,}", fill="black", font=font, anchor="ma")
            last = x
    _scale(picture, draw, font, left + max(across, 120) + 16, top, max(down, 80), low, high, log)
    return np.asarray(picture)


def _scale(
    picture: Any, draw: Any, font: Any, x: int, top: int, height: int, low: float, high: float, log: bool
) -> None:
    from PIL import Image

    ramp = np.linspace(high, low, height)[:, None].repeat(12, 1)
    picture.paste(Image.fromarray(colours(ramp, low, high)), (x, top))
    for share in (0.0, 0.5, 1.0):
        value = high - share * (high - low)
        text = f"{10**value:.3g}" if log else f"{value:.3g}"
        draw.text((x + 16, top + share * (height - 1)), text, fill="black", font=font, anchor="lm")


def shortened(names: Sequence[str]) -> list[str]:
    """Names without the parts that all have in common at their beginning."""
    parts = [name.split(".") for name in names]
    shared = 0
    while parts and all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [".".join(part[shared:]) for part in parts]
