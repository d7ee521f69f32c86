"""Data sets in MileBench's layout, each broken in some random way."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDER = "TQA"


@dataclass
class Victim:
    """A data root under destruction: its annotation is written last, as `raw` or from `content`."""

    root: Path
    rng: random.Random
    content: Any
    raw: bytes | None = None

    @property
    def images(self) -> Path:
        return self.root / FOLDER / "images"

    def image(self) -> Path:
        """The place of one of the image files, empty now."""
        path = self.images / f"{self.rng.randrange(3)}_{self.rng.randrange(2)}.png"
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        return path


def _entry(number: int) -> dict[str, Any]:
    return {
        "sample_id": number,
        "task_instruction_id": number % 2,
        "image_quantity_level": "Few",
        "task_instance": {
            "context": f"{{image#1}} and {{table#2}}Which colour, {number}?",
            "images_path": [f"{number}_{k}.png" for k in range(2)],
            "choice_list": ["red", "Green.", "1,000 blue"],
        },
        "response": "green",
    }


def _content() -> dict[str, Any]:
    meta = {"question_type": "multi-choice", "task_instruction": ["Look.", "Choose."]}
    return {"meta_data": meta, "data": [_entry(number) for number in range(3)]}


@cache
def _picture(mode: str = "RGB", kind: str = "PNG", frames: int = 1, side: int = 12) -> bytes:
    picture = Image.effect_noise((side, side), 90).convert("I" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = picture.point(lambda value: value * 200).convert("I;16")
    more: dict[str, Any] = {}
    if frames > 1:
        more = {"save_all": True, "append_images": [picture.rotate(90 * k) for k in range(frames)]}
    if mode == "P":
        more["transparency"] = bytes(range(256)) if kind == "PNG" else 3
    content = io.BytesIO()
    picture.save(content, format=kind, **more)
    return content.getvalue()


# ---- the annotation as a tree of JSON values


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) of a tree."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys if isinstance(node, dict | list) else ():
        yield node, key
        yield from _places(node[key]) if isinstance(node[key], dict | list) else ()


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def _values(rng: random.Random) -> Any:
    """A value that hardly ever belongs where it is put."""
    plain: list[Any] = [None, True, False, 0, -1, 1, 2, 2**63, -(2**63), 10**400, 1.5, -0.0]
    plain += [float("nan"), float("inf"), [], {}, [None], [[]], {"": []}, [""], "", "\n\t", "\0"]
    plain += ["a\ud83db", "\u202e\u200d", "ß" * 50, "x" * 20_000, "<ImageHere>", "{image#1}", "{i}"]
    plain += ["{image#99999999999999999999}", "{table#-1}\n", "{image#{image#1}}", "green", "?!"]
    plain += [_nested(rng.randrange(50, 990)), ["{image#1}"] * 300, list(range(300))]
    plain += ["".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(8))]
    return rng.choice(plain)


def replace_value(victim: Victim) -> None:
    holder, key = victim.rng.choice(list(_places(victim.content)))
    holder[key] = _values(victim.rng)


def remove_value(victim: Victim) -> None:
    holder, key = victim.rng.choice(list(_places(victim.content)))
    del holder[key]


def repeat_value(victim: Victim) -> None:
    holder, key = victim.rng.choice(list(_places(victim.content)))
    if isinstance(holder, list):
        holder.insert(victim.rng.randrange(len(holder) + 1), holder[key])
    else:
        holder[str(key) + victim.rng.choice(("", " ", "2"))] = holder[key]


def wrap_value(victim: Victim) -> None:
    holder, key = victim.rng.choice(list(_places(victim.content)))
    wrappers: list[Callable[[Any], Any]] = [str, lambda v: [v], lambda v: {"0": v}, json.dumps]
    holder[key] = victim.rng.choice(wrappers)(holder[key])


def add_key(victim: Victim) -> None:
    holders = [holder for holder, _ in _places(victim.content) if isinstance(holder, dict)]
    victim.rng.choice(holders)[victim.rng.choice(("more", "", "é", "Data"))] = _values(victim.rng)


def swap_values(victim: Victim) -> None:
    (one, a), (other, b) = (victim.rng.choice(list(_places(victim.content))) for _ in range(2))
    first, second = one[a], other[b]
    inside = json.dumps(first, default=str), json.dumps(second, default=str)
    if inside[0] not in inside[1] and inside[1] not in inside[0]:  # a tree must stay one
        one[a], other[b] = second, first


def whole_content(victim: Victim) -> None:
    victim.content = victim.rng.choice([[], None, 3, "x", {}, [victim.content], {"data": []}])


def name_image(victim: Victim) -> None:
    """Image names that lead somewhere else, to nothing, or by a detour to the same file."""
    outside = victim.root.parent / "outside.png"
    names = ["../../../outside.png", str(outside), f"../{outside.name}", "~/x.png", "C:\\x.png", ""]
    names += ["..\\x.png", "\\\\host\\x.png", "./0_0.png", "a/../0_0.png", "../images/0_0.png", "."]
    names += ["x" * 300, "a/" * 3000 + "x", "0_0.png\n", "0_0.png\0", "\ud83d.png", "0_0.PNG"]
    names += ["file:///etc/passwd", "http://127.0.0.1:9/x.png", "/dev/zero", "/proc/self/mem"]
    names += [str(victim.images / "0_0.png"), "0_1.png", "é.png", "%2e%2e/x.png", "0_0.png/x"]
    instance = victim.content["data"][victim.rng.randrange(3)]["task_instance"]
    instance["images_path"][victim.rng.randrange(2)] = victim.rng.choice(names)


# ---- the annotation as bytes


def _written(victim: Victim) -> bytes:
    if victim.raw is not None:
        return victim.raw
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return json.dumps(victim.content).encode()
    finally:
        sys.setrecursionlimit(limit)


def flip_bytes(victim: Victim) -> None:
    content = bytearray(_written(victim))
    for _ in range(victim.rng.randrange(1, 4)):
        content[victim.rng.randrange(len(content))] = victim.rng.randrange(256)
    victim.raw = bytes(content)


def cut_bytes(victim: Victim) -> None:
    content = _written(victim)
    victim.raw = content[: victim.rng.randrange(len(content))]


def encode_otherwise(victim: Victim) -> None:
    text = json.dumps(victim.content, ensure_ascii=False)
    code = victim.rng.choice(("utf-8-sig", "utf-16", "utf-32", "latin-1", "cp037"))
    victim.raw = text.encode(code, "replace")


def write_otherwise(victim: Victim) -> None:
    """Text that `json.dumps` wouldn't write: keys twice, odd numbers, deep nests, loose ends."""
    text = _written(victim).decode(errors="replace")
    odd = ["1" * 5000, "1e999", "-0", "01", "0x1", "NaN", "-Infinity", "1" * 300, "true", "[1,]"]
    pieces = [(f'"sample_id": {n}', f'"sample_id": {victim.rng.choice(odd)}') for n in range(3)]
    pieces += [('"data": [', '"data": [], "data": ['), ('"context"', '"context": "", "context"')]
    pieces += [('"data": [', '"data": [' + "[" * victim.rng.choice((50, 990, 100_000)))]
    pieces += [("}]}", "}],}"), ("{", "{ /* */"), (": ", " : \n"), ('"green"', "'green'")]
    old, new = victim.rng.choice(pieces)
    victim.raw = text.replace(old, new, 1).encode()


# ---- image files


def _png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose head promises a size that its few bytes don't hold."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    pixels = (b"IDAT", zlib.compress(b"\0" * 100))
    for kind, body in ((b"IHDR", head), *chunks, pixels, (b"IEND", b"")):
        checksum = zlib.crc32(kind + body)
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum))
    return b"".join(parts)


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


def damage_image(victim: Victim) -> None:
    """Some bytes of a valid file of any format changed, cut off or moved."""
    rng, kind = victim.rng, victim.rng.choice(KINDS)
    mode, side = "P" if kind == "GIF" else "RGB", rng.choice((3, 12, 64))
    content = bytearray(_picture(mode, kind, side=side))
    reach = rng.choice((40, len(content)))  # heads are where decoders differ most
    for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(min(reach, len(content)))] = rng.choice((0, 255, rng.randrange(256)))
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    if rng.random() < 0.1:
        content[rng.randrange(len(content) + 1) :] = rng.randbytes(30)
    victim.image().write_bytes(content)


def odd_image(victim: Victim) -> None:
    """Valid files of unusual kinds, all of which can be shown."""
    odd = [("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("P", "PNG"), ("I;16", "PNG")]
    odd += [("CMYK", "JPEG"), ("L", "JPEG"), ("P", "GIF"), ("RGBA", "WEBP"), ("P", "BMP")]
    odd += [("1", "BMP"), ("RGBA", "PNG")]
    moving = [("RGB", "PNG", 3), ("P", "GIF", 3), ("RGB", "WEBP", 3)]
    victim.image().write_bytes(_picture(*victim.rng.choice([*odd, *moving])))


def no_image(victim: Victim) -> None:
    """Files that are no image, of no format that is read, or of a size beyond sense."""
    sizes = [(0, 0), (0, 9), (60_000, 60_000), (8001, 8001), (1, 16_385), (9, 2000), (2**31 - 1, 1)]
    bomb = (b"zTXt", b"note\0\0" + zlib.compress(b"\0" * 3_000_000))
    contents = [_png(*size) for size in sizes] + [_png(12, 12, bomb)]
    contents += [_picture("RGB", kind) for kind in ("TIFF", "ICO", "PPM", "TGA", "PDF", "EPS")]
    contents += [b"", b"\0" * 100, b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM"]
    contents += [b"<svg/>", b"GIF89a" + bytes(7) + b";", victim.rng.randbytes(400)]
    victim.image().write_bytes(victim.rng.choice(contents))


def no_file(victim: Victim) -> None:
    """Something else in the place of a file."""
    path, outside = victim.image(), victim.root.parent / "outside.png"
    kind = victim.rng.choice(("gone", "folder", "pipe", "link", "loop", "far", "device", "memory"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        targets = {"link": outside, "loop": path, "far": victim.root / "none"}
        path.symlink_to(targets.get(kind, "/dev/zero" if kind == "device" else "/proc/self/mem"))


def move_images(victim: Victim) -> None:
    """The folder of images gone, or a link to somewhere."""
    away = victim.root.parent / "away"
    victim.images.rename(away)
    if victim.rng.random() < 0.7:
        victim.images.symlink_to(away)


def move_annotation(victim: Victim) -> None:
    """The task's folder or root gone; called when all else is written."""
    kind = victim.rng.choice(("root", "folder"))
    path = victim.root if kind == "root" else victim.root / FOLDER
    shutil.rmtree(path)
    if victim.rng.random() < 0.5:
        path.write_text("a file")


TREE = (replace_value, remove_value, repeat_value, wrap_value, add_key, swap_values, whole_content)
BYTES = (flip_bytes, cut_bytes, encode_otherwise, write_otherwise)
FILES = (damage_image, damage_image, damage_image, odd_image, no_image, no_file, move_images)


def _apply(victim: Victim, kinds: tuple[Callable[[Victim], None], ...], most: int) -> None:
    for _ in range(victim.rng.randrange(1, most + 1)):
        # What it would change may be gone already.
        with suppress(LookupError, TypeError, ValueError, OSError, RecursionError):
            victim.rng.choice(kinds)(victim)


def _break(victim: Victim) -> None:
    turn = victim.rng.random()
    if turn < 0.1:
        name_image(victim)
    if turn < 0.55:
        _apply(victim, TREE, 3)
    if 0.5 < turn < 0.65:
        _apply(victim, BYTES, 2)
    if turn > 0.6:
        _apply(victim, FILES, 3)
    path = victim.root / FOLDER / f"{FOLDER}.json"
    path.write_bytes(_written(victim))
    if turn > 0.99:
        move_annotation(victim)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[int], Path]:
    """Makes the broken data root number `seed`; the one before it is gone then."""

    def make(seed: int) -> Path:
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        (place / "root" / FOLDER / "images").mkdir(parents=True)
        (place / "outside.png").write_bytes(_picture())
        victim = Victim(place / "root", random.Random(seed), _content())
        for number in range(3):
            for k in range(2):
                (victim.images / f"{number}_{k}.png").write_bytes(_picture())
        _break(victim)
        return victim.root

    return make
