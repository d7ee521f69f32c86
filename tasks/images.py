"""Images of a task: finding them inside its folder, opening them within limits."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from kvbench.errors import UserError, brief

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
MAX_FILE_BYTES = 128 * 1024 * 1024
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MAX_RATIO = 200
"""Longer side to shorter: models make the shorter one hundreds of pixels, or pad to a square."""

# What Pillow's decoders raise on damaged files, besides OSError.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def locate(task_folder: Path, name: str, where: str) -> Path:
    """The absolute path of image `name` in `task_folder`/images.

    Args:
        task_folder: the task's folder, absolute.
        name: as written in `images_path`.
        where: file and sample, for the error message.

    Raises:
        UserError: the name is absolute or climbs up, a link leads out of the task's folder, or
            there is no such file.
    """
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise UserError(
            f"{where}: image name '{brief(name)}' leads out of the images folder; "
            f"use names relative to it, without '..'"
        )
    try:
        path = (task_folder / "images" / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _missing(task_folder, name, where) from error
    if not path.is_relative_to(task_folder.resolve()):
        raise UserError(
            f"{where}: image '{brief(name)}' is a link that leaves {task_folder}; "
            f"put the file itself there"
        )
    if not path.is_file():
        raise _missing(task_folder, name, where)
    return path


def _missing(task_folder: Path, name: str, where: str) -> UserError:
    return UserError(
        f"{where}: image '{brief(name)}' is not in {task_folder / 'images'}; "
        f"unpack the archive again or restore the file"
    )


def image_bytes(path: Path) -> bytes:
    """Reads an image's file as it is.

    Raises:
        UserError: the file is missing, larger than `MAX_FILE_BYTES` or unreadable.
    """
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise UserError(
                f"{path}: {size:,} bytes are too large for an image, the limit is "
                f"{MAX_FILE_BYTES:,}; scale it down"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: the image is missing; restore the file") from error
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror}); check its rights") from error


def open_image(path: Path) -> Image:
    """Reads an image completely and converts it to RGB.

    Only the formats of `FORMATS` are tried, whatever the file's name says. Files over
    `MAX_FILE_BYTES` and images over `MAX_PIXELS` (or Pillow's own `MAX_IMAGE_PIXELS`, if lower),
    `MAX_SIDE` or `MAX_RATIO` are refused before they are decoded. Of a moving image the first
    frame counts; transparency is ignored; 16-bit greys keep their upper eight bits.

    Raises:
        UserError: the file is missing, too large, damaged, truncated or of another format.
    """
    from PIL import Image, UnidentifiedImageError

    content = io.BytesIO(image_bytes(path))
    try:
        with Image.open(content, formats=FORMATS) as image:
            _check_size(path, *image.size)
            return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: too many pixels to open ({error}); scale it down") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not an image of a known format ({', '.join(FORMATS)}); convert or restore it"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{path}: the image is damaged ({error}); restore the file") from error


def _rgb(image: Image) -> Image:
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    # Pillow would cut off at 255 here, which makes most of the image white.
    return image.convert("I").point(lambda value: value / 256, "L").convert("RGB")


def _check_size(path: Path, width: int, height: int) -> None:
    from PIL import Image

    if not width or not height:
        raise UserError(f"{path}: the image is empty ({width} x {height} pixels); restore the file")
    limit = min(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
    if width * height > limit:
        raise UserError(
            f"{path}: {width} x {height} pixels are too many, the limit is {limit:,}; scale it down"
        )
    longer, shorter = max(width, height), min(width, height)
    if longer > MAX_SIDE or longer > MAX_RATIO * shorter:
        raise UserError(
            f"{path}: {width} x {height} pixels are too long a strip, the limits are "
            f"{MAX_SIDE:,} pixels a side and {MAX_RATIO} : 1; crop it"
        )
