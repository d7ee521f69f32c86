"""A new method: its file and its test, in a checkout of kvbench or as a package of their own."""

from __future__ import annotations

import keyword
import re
import shlex
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from kvbench.errors import UserError
from kvbench.registry import METHODS

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = {"all", "none"}  # mean something where a method's name is expected


@dataclass(frozen=True)
class Skeleton:
    """Files that are not written yet.

    Attributes:
        files: Text by path.
        commands: What to run then, in this order.
    """

    files: dict[Path, str]
    commands: tuple[str, ...]

    def write(self) -> None:
        """Write all files, or none.

        Raises:
            UserError: One of them is there already, or can't be written.
        """
        for path in self.files:
            if path.exists():
                raise UserError(f"{path} is there already: choose another name, or remove it")
        try:
            for path, text in self.files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror or error})") from error


def method_skeleton(name: str, folder: Path, package: bool) -> Skeleton:
    """The skeleton of a method.

    Args:
        name: What `--methods` will call it.
        folder: Root of a checkout of kvbench; for a package, where its folder goes.
        package: Whether it becomes a package of its own, with an entry point.

    Raises:
        UserError: The name can't be used, or `folder` is no checkout of this kvbench.
    """
    module = f"kvbench_{name}" if package else f"kvbench.methods.{name}"
    _check(name, module)
    root = folder / f"kvbench-{name.replace('_', '-')}" if package else _checkout(folder)
    code = root / (f"{module}.py" if package else f"methods/{name}.py")
    test = root / (f"test_{module}.py" if package else f"tests/methods/test_{name}.py")
    values = {"name": name, "title": _title(name), "module": module, "package": package}
    found = {code: _render("method.py", values), test: _render("test_method.py", values)}
    if package:
        found[root / "pyproject.toml"] = _render("pyproject.toml", values)
    install = (f"python -m pip install -e {shlex.quote(str(root))}",) if package else ()
    evaluate = f"kvbench eval --methods fp16,{name} --tasks wqa --limit 2"
    return Skeleton(found, (*install, f"python -m pytest {shlex.quote(str(test))}", evaluate))


def _check(name: str, module: str) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in _RESERVED:
        raise UserError(
            f"{name!r} can't name a method: use a word like int4_window, of small letters, digits "
            "and _"
        )
    if name in METHODS.names():
        raise UserError(
            f"there is a method {name!r} already, from {METHODS.origin(name)}: choose another name"
        )
    if find_spec(module) is not None:
        raise UserError(f"there is a module {module} already: choose another name")


def _checkout(folder: Path) -> Path:
    """The folder, if the methods that this kvbench knows are those in it."""
    spec = find_spec("kvbench.methods")
    places = spec.submodule_search_locations if spec else None
    if (folder / "methods").resolve() not in [Path(place).resolve() for place in places or ()]:
        raise UserError(
            f"{folder.resolve()} is not the checkout that this kvbench runs from: name its root "
            "with --folder, or give --package for a package of your own"
        )
    return folder


def _title(name: str) -> str:
    """``int4_window`` becomes ``Int4Window``."""
    return "".join(part.capitalize() for part in name.split("_"))


def _render(template: str, values: dict[str, object]) -> str:
    from jinja2 import Environment, StrictUndefined

    text = (files("kvbench.skeletons") / f"{template}.j2").read_text(encoding="utf-8")
    # It makes Python and TOML, where nothing is to be escaped as in HTML.
    made = Environment(  # nosec B701
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return made.from_string(text).render(values)
