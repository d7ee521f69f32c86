"""The closed vocabularies of the facts that describe an image."""

from __future__ import annotations

from kvbench.tasks.minimile.cameras import VEHICLES
from kvbench.tasks.minimile.canvas import BACKGROUNDS, COLORS, SHAPES
from kvbench.tasks.minimile.film import SCENES

_COLORS = tuple(COLORS)
_NONE = ("none",)
_DIGITS = tuple("0123456789")
_PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)

FACT_VOCABULARY: dict[str, tuple[str, ...]] = {
    "color": (*_COLORS, "brown", "gray"),  # the last two only in easy-VQA
    "shape": (*SHAPES, "rectangle"),  # likewise
    "background": tuple(BACKGROUNDS),
    "place": _PLACES,
    "vehicle": tuple(VEHICLES),
    "scene": tuple(SCENES),
    "number_tens": _DIGITS[1:],
    "number_units": _DIGITS,
    "bullets": _DIGITS[1:6],
    "title_color": _COLORS,
    "tallest_color": _COLORS,
    **{f"{side}_color": _COLORS for side in ("left", "middle", "right")},
    **{f"{side}_shape": SHAPES for side in ("left", "middle", "right")},
    "hand_color": _COLORS + _NONE,
    "hand_shape": SHAPES + _NONE,
    **{f"{kind}_color": _COLORS for kind in ("moving", "still")},
    **{f"{kind}_shape": SHAPES for kind in ("moving", "still")},
    **{f"door_{side}": _COLORS + _NONE for side in ("left", "ahead", "right", "near")},
    **{f"layer_{layer}": _COLORS for layer in ("top", "middle", "bottom")},
    **{f"row{row}_color": _COLORS for row in (1, 2, 3)},
    **{f"row{row}_shape": SHAPES for row in (1, 2, 3)},
    **{f"row{row}_digit": _DIGITS[1:] for row in (1, 2, 3)},
}
"""Attribute -> its possible values, of minimile's and easy-VQA's images."""
