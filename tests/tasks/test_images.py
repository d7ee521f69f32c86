from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvbench.errors import UserError
from kvbench.tasks import images
from kvbench.tasks.images import open_image


def noise(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.effect_noise(size, 60).convert(mode)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose head promises a size that its few bytes don't hold."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        checksum = zlib.crc32(kind + body)
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum))
    return b"".join(parts)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *((suffix, mode) for suffix in ("png", "webp", "gif") for mode in ("RGB", "RGBA", "P")),
        *((suffix, mode) for suffix in ("jpg", "bmp") for mode in ("RGB", "L")),
    ],
)
def test_every_format_opens_as_rgb(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"x.{suffix}"
    noise(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (64, 48))


def test_pixels_come_back_and_the_file_may_go(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    original = noise()
    original.save(path)
    image = open_image(path)
    path.unlink()
    assert image.tobytes() == original.tobytes()


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise().save(path, format="PNG")
    assert open_image(path).size == (64, 48)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    noise().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"x\.{suffix}: .*restore"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_files_that_are_no_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"x\.png: (not an image of a known format|the image is dam)"
    ):
        open_image(path)


def test_other_formats_are_not_tried(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    noise().save(path, format="TIFF")
    with pytest.raises(UserError, match=r"not an image of a known format \(PNG, JPEG"):
        open_image(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.png: the image is missing"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("size", "part"),
    [
        ((16_385, 100), "16385 x 100 pixels are too long a strip"),
        ((100, 16_385), "too long a strip, the limits are 16,384 pixels a side and 200 : 1"),
        ((1, 201), "1 x 201 pixels are too long a strip"),
    ],
)
def test_strips_are_refused(tmp_path: Path, size: tuple[int, int], part: str) -> None:
    """A model's processor makes the shorter side hundreds of pixels, or pads to a square."""
    path = tmp_path / "x.png"
    Image.new("1", size).save(path)
    with pytest.raises(UserError, match=rf"x\.png: .*{part}.*crop it"):
        open_image(path)
    Image.new("1", (1, 200)).save(path)
    assert open_image(path).size == (1, 200)


def test_an_empty_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    noise("P").save(path)
    content = bytearray(path.read_bytes())
    place = content.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 64, 48))
    content[place + 5 : place + 9] = content[6:10] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.gif: (the image is empty|not an image|the image is)"):
        open_image(path)


def test_sixteen_bit_greys_keep_their_upper_bits(tmp_path: Path) -> None:
    """Pillow alone shows everything above 255 of 65,535 as white."""
    path = tmp_path / "x.png"
    ramp = np.linspace(0, 65_535, 64 * 48).astype(np.uint16).reshape(48, 64)
    Image.fromarray(ramp).save(path)
    shown = np.asarray(open_image(path))
    assert shown.shape == (48, 64, 3)
    assert (shown == (ramp // 256)[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_of_a_moving_image_the_first_frame_counts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "blue")]
    more = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **more)
    assert np.asarray(open_image(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 48


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])
def test_enormous_images_are_refused_unopened(tmp_path: Path, side: int) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_claiming(side, side))
    with pytest.raises(UserError, match=r"x\.png: .*(too many pixels|are too many).*scale it down"):
        open_image(path)


def test_a_lower_limit_of_pillow_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    path = tmp_path / "x.png"
    noise(size=(60, 50)).save(path)
    assert open_image(path).size == (60, 50)
    noise(size=(61, 50)).save(path)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UserError, match=r"61 x 50 pixels are too many, the limit is 3,000"),
    ):
        open_image(path)


def test_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    noise().save(path)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", path.stat().st_size)
    assert open_image(path).size == (64, 48)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(UserError, match=r"bytes are too large for an image"):
        open_image(path)
