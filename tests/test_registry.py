"""Finding objects by name: built-in modules, plug-ins, and what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any, ClassVar

import pytest

from kvbench.cache import Needs
from kvbench.errors import UserError
from kvbench.registry import METHODS, Registry

Plugins = Callable[[str], None]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with a package `shelf` of two modules, and a private one that fails."""
    package = tmp_path / "shelf"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "base.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\n"
        "class Book:\n    pages: int = 1\n"
    )
    (package / "novels.py").write_text(
        "from shelf.base import Book\nBOOKS = {'emma': Book(), 'ulysses': Book()}\n"
    )
    (package / "plays.py").write_text("from shelf.base import Book\nBOOKS = {'hamlet': Book()}\n")
    (package / "_draft.py").write_text("raise RuntimeError('not to be imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] in ("shelf", "extra")]:
        del sys.modules[name]


@pytest.fixture
def plugins(tmp_path: Path, shelf: Path) -> Plugins:
    """A function that installs a distribution with the given entry points of the group `books`."""

    def install(points: str) -> None:
        info = tmp_path / "extra-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[books]\n" + dedent(points))
        (tmp_path / "extra.py").write_text(
            "from dataclasses import dataclass\nfrom shelf.base import Book\n"
            "faust = Book()\nnumber = 3\n\nclass Pamphlet(Book):\n    pass\n\n"
            "@dataclass(frozen=True)\nclass Named(Book):\n    name: str = 'werther'\n\n"
            "werther = Named()\n"
        )
        (tmp_path / "extra_leaves.py").write_text("raise SystemExit(3)\n")
        (tmp_path / "extra_broken.py").write_text("import not_installed_anywhere\n")

    return install


def books(package: str = "shelf") -> Registry[object]:
    return Registry("book", "shelf.base:Book", package, "BOOKS", "books")


def test_modules_are_found_and_private_ones_are_not(shelf: Path) -> None:
    registry = books()
    assert registry.names() == ["emma", "ulysses", "hamlet"]
    assert type(registry.get("hamlet")).__name__ == "Book"
    assert registry.origin("hamlet") == "shelf.plays"
    assert registry.get("emma") is registry.get("emma")


def test_nothing_is_imported_before_a_name_is_asked_for(shelf: Path) -> None:
    registry = books()
    assert "shelf" not in sys.modules
    registry.names()
    assert "shelf" in sys.modules


def test_a_module_may_stand_for_a_package(shelf: Path) -> None:
    assert books("shelf.plays").names() == ["hamlet"]


def test_unknown_name_suggests_close_ones(shelf: Path) -> None:
    with pytest.raises(UserError, match=r"unknown book 'hamlte': did you mean hamlet\?"):
        books().get("hamlte")
    with pytest.raises(UserError, match="known are emma, ulysses, hamlet"):
        books().get("zzz")
    with pytest.raises(UserError, match="unknown book 'zzz'"):
        books().origin("zzz")


def test_a_name_in_two_modules_is_refused(shelf: Path) -> None:
    (shelf / "verse.py").write_text("from shelf.base import Book\nBOOKS = {'emma': Book()}\n")
    with pytest.raises(UserError, match=r"'emma' is defined by shelf\.novels and by shelf\.verse"):
        books().names()


def test_an_object_of_another_kind_is_refused(shelf: Path) -> None:
    (shelf / "verse.py").write_text("BOOKS = {'odes': 'text'}\n")
    with pytest.raises(UserError, match=r"shelf\.verse\.BOOKS\['odes'\] is a str"):
        books().names()


@pytest.mark.parametrize(
    ("text", "line"), [("x = (\n", 1), ("import nowhere_at_all\n", 1), ("\n\n1 / 0\n", 3)]
)
def test_a_module_with_a_mistake_is_named(shelf: Path, text: str, line: int) -> None:
    (shelf / "verse.py").write_text(text)
    with pytest.raises(UserError, match=rf"shelf\.verse can't .*verse\.py:{line}\)") as got:
        books().names()
    assert "\n" not in str(got.value)


def test_what_a_method_lacks_is_named() -> None:
    @dataclass(frozen=True)
    class Nameless:
        paper: ClassVar[str] = "-"
        needs: ClassVar[Needs] = Needs()

        def layer(self, spec: Any, calibration: Any) -> Any: ...

    with pytest.raises(UserError, match=r"KVQuantizer or .*; it has no label$"):
        METHODS._checked("x", Nameless(), "the plug-in a:b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [("label", 5, "is a int: it must be a str"), ("needs", None, "is a NoneType: .* a Needs")],
)
def test_metadata_of_another_type_is_refused(part: str, value: Any, words: str) -> None:
    parts = {"label": "-", "paper": "-", "needs": Needs(), "layer": id, part: value}
    method = make_dataclass("Odd", [], namespace=parts, frozen=True)()
    with pytest.raises(UserError, match=rf"^{part} of the plug-in a:b {words}"):
        METHODS._checked("x", method, "the plug-in a:b")


def test_plugins_are_listed_unseen_and_loaded_on_demand(plugins: Plugins) -> None:
    plugins("faust = extra:faust\n")
    registry = books()
    assert registry.names() == ["emma", "ulysses", "hamlet", "faust"]
    assert "extra" not in sys.modules
    assert type(registry.get("faust")).__name__ == "Book"
    assert registry.origin("faust") == "extra:faust"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("extra_broken:x", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("extra:missing", "AttributeError"),
        ("extra_leaves:x", "can't be imported (SystemExit: 3, "),
        ("extra:number", "extra:number is a int: a book must be an instance of shelf.base.Book"),
        ("extra:Pamphlet", "extra:Pamphlet is a class: a book must be an instance, Pamphlet(...)"),
        ("extra:werther", "is registered as 'bad' and calls itself 'werther': give the book one"),
    ],
)
def test_a_broken_plugin_fails_only_when_asked_for(plugins: Plugins, value: str, part: str) -> None:
    plugins(f"bad = {value}\n")
    registry = books()
    assert "bad" in registry.names()
    registry.get("emma")
    with pytest.raises(UserError) as caught:
        registry.get("bad")
    assert part in str(caught.value)


def test_an_object_without_fields_is_refused() -> None:
    """Protocols take anything with the right attributes; parameters are read from fields."""
    registry: Registry[object] = Registry("thing", "builtins:object", "enum", "THINGS", "things")
    with pytest.raises(UserError, match="no dataclass: decorate the class with @dataclass"):
        registry._checked("x", object(), "the plug-in a:b")


def test_builtin_names_come_without_plugins(plugins: Plugins) -> None:
    plugins("faust = extra:faust\n")
    assert books().builtin() == ["emma", "ulysses", "hamlet"]


def test_a_plugin_with_a_taken_name_is_refused(plugins: Plugins) -> None:
    plugins("emma = extra:faust\n")
    registry = books()
    assert registry.names() == ["emma", "ulysses", "hamlet"]
    with pytest.raises(UserError, match=r"'emma' is defined by shelf\.novels and by extra:faust"):
        registry.get("emma")
