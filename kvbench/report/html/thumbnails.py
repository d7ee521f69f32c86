"""A sample's images on one small contact sheet."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

BUDGET = 6_500_000
"""Bytes of all sheets of a page before base64, which makes 8.7 MB of them."""
MOST = 12
"""Images on a sheet; of a longer sample the first are shown."""
COLUMNS = 6
GAP = 2
"""Pixels between images."""

_SIZES = ((128, 60), (96, 50), (64, 40), (48, 35), (32, 30))
_BETWEEN = "#808080"


@dataclass(frozen=True)
class Sheet:
    """A WebP picture of the first `shown` of `total` images, in reading order."""

    content: bytes
    width: int
    height: int
    shown: int
    total: int

    @property
    def base64(self) -> str:
        """The picture as text."""
        return base64.b64encode(self.content).decode("ascii")


def contact_sheet(images: Sequence[Image], total: int, room: int) -> Sheet | None:
    """Put images beside each other, in rows of `COLUMNS`, as large as the room allows.

    Args:
        images: The first images of a sample, RGB, at most `MOST`.
        total: How many the sample has.
        room: Bytes that the picture may take.

    Returns:
        The sheet; None without images, or where not even the smallest fits.
    """
    if not images:
        return None
    for edge, quality in _SIZES:
        sheet = _arrange(images, edge)
        smallest = min(_encodings(sheet, quality), key=len)
        if len(smallest) <= room:
            return Sheet(smallest, *sheet.size, len(images), total)
    return None


def _arrange(images: Sequence[Image], edge: int) -> Image:
    from PIL import Image

    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((edge, edge))  # never enlarges
    width = max(image.width for image in small) + GAP
    height = max(image.height for image in small) + GAP
    columns = min(COLUMNS, len(small))
    rows = -(-len(small) // columns)
    sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), _BETWEEN)
    for place, image in enumerate(small):
        row, column = divmod(place, columns)
        sheet.paste(image, (column * width, row * height))
    return sheet


def _encodings(sheet: Image, quality: int) -> Iterator[bytes]:
    """Photographs are smaller with losses, drawings without."""
    options: tuple[dict[str, Any], ...] = ({"quality": quality}, {"lossless": True})
    for option in options:
        content = BytesIO()
        sheet.save(content, "WEBP", **option)
        yield content.getvalue()
