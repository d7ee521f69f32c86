"""Names of methods, models and tasks, and the objects behind them.

Built-in objects live in modules that hold a dictionary (``METHODS``, ``MODELS``, ``TASKS``); other
distributions add theirs through entry points. Nothing is imported before a name is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar

from kvbench.errors import UserError, fault
from kvbench.specs import canonical_spec, configured, parse_spec, split_specs, suggestion

if TYPE_CHECKING:
    from kvbench.cache import ForeignCache, KVQuantizer
    from kvbench.models.zoo import ModelEntry
    from kvbench.tasks.base import Task

__all__ = [
    "METHODS",
    "MODELS",
    "TASKS",
    "Registry",
    "canonical_spec",
    "configured",
    "parse_spec",
    "split_specs",
]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and objects of one kind, found when first asked for.

    Every object is an instance of a dataclass: its fields are what ``name[field=value]`` sets. One
    with a field ``name`` is registered under that name and no other.

    Example:
        >>> from kvbench import METHODS
        >>> METHODS.get("kivi").label
        'KIVI'

    Args:
        kind: What an object is called in messages, such as ``"method"``.
        base: Class of every object, as ``"module:Class"`` so that it is imported late; or several,
            of which an object must have one.
        package: Package whose modules are searched (not those named ``_...``), or a single module.
        attribute: Name of the ``dict[str, T]`` that a searched module may define.
        group: Entry-point group of other distributions' objects; a value names the object itself.
        parts: Class of attributes that an object may have, as ``base``'s.
    """

    def __init__(
        self,
        kind: str,
        base: str | tuple[str, ...],
        package: str,
        attribute: str,
        group: str,
        parts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind = kind
        self._bases = (base,) if isinstance(base, str) else base
        self._package = package
        self._attribute = attribute
        self._group = group
        self._parts = parts

    def names(self) -> list[str]:
        """All names: built-in ones in their modules' order, then plug-ins (not imported yet)."""
        return [*self._builtin, *(name for name in self._plugins if name not in self._builtin)]

    def builtin(self) -> list[str]:
        """The names that kvbench brings itself, in their modules' order."""
        return list(self._builtin)

    def get(self, name: str) -> T:
        """Return the object called `name`.

        Raises:
            UserError: The name is unknown or taken twice, or its plug-in can't be loaded or isn't
                what it should be.
        """
        origins = self._origins(name)
        if len(origins) > 1:
            raise UserError(
                f"{self.kind} {name!r} is defined by {' and by '.join(origins)}: "
                "rename one or uninstall its package"
            )
        if name in self._builtin:
            return self._builtin[name][0]
        return self._load(self._plugins[name][0])

    def origin(self, name: str) -> str:
        """Where `name` is defined: a built-in module, or a plug-in's ``module:object``.

        Raises:
            UserError: The name is unknown.
        """
        return self._origins(name)[0]

    @cached_property
    def _builtin(self) -> dict[str, tuple[T, str]]:
        """Object and defining module by name."""
        found: dict[str, tuple[T, str]] = {}
        for module in _modules(self._package):
            objects: Mapping[str, T] = getattr(module, self._attribute, {})
            for name, value in objects.items():
                if name in found:
                    raise UserError(
                        f"{self.kind} {name!r} is defined by {found[name][1]} "
                        f"and by {module.__name__}: rename one"
                    )
                where = f"{module.__name__}.{self._attribute}[{name!r}]"
                found[name] = (self._checked(name, value, where), module.__name__)
        return found

    @cached_property
    def _plugins(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name. A package that is on the path twice counts once."""
        found: dict[str, list[EntryPoint]] = {}
        points = entry_points(group=self._group)
        for point in sorted(points, key=lambda point: (point.name, point.value)):
            same = found.setdefault(point.name, [])
            if all(point.value != other.value for other in same):
                same.append(point)
        return found

    def _origins(self, name: str) -> list[str]:
        origins = [self._builtin[name][1]] if name in self._builtin else []
        origins += [point.value for point in self._plugins.get(name, [])]
        if not origins:
            raise UserError(self._unknown(name))
        return origins

    def _load(self, point: EntryPoint) -> T:
        # A plug-in is foreign code: whatever goes wrong in it must name it, not break kvbench.
        try:
            value = point.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"{self.kind} {point.name!r} comes from the plug-in {point.value}, which can't be "
                f"imported ({fault(error)}): repair or uninstall it"
            ) from error
        return self._checked(point.name, value, f"the plug-in {point.value}")

    def _checked(self, name: str, value: T, where: str) -> T:
        if isinstance(value, type):  # which has all that its instances have, and passes as one
            raise UserError(
                f"{where} is a class: a {self.kind} must be an instance, {value.__name__}(...)"
            )
        if not isinstance(value, tuple(pkgutil.resolve_name(base) for base in self._bases)):
            known = " or ".join(base.replace(":", ".") for base in self._bases)
            raise UserError(
                f"{where} is a {type(value).__name__}: a {self.kind} must be an instance of {known}"
                + _lacks(value, pkgutil.resolve_name(self._bases[0]))
            )
        for part, kind in self._parts.items():
            wanted = pkgutil.resolve_name(kind)
            if hasattr(value, part) and not isinstance(given := getattr(value, part), wanted):
                raise UserError(
                    f"{part} of {where} is a {type(given).__name__}: it must be a {wanted.__name__}"
                )
        if not dataclasses.is_dataclass(value):
            raise UserError(
                f"{where} is a {type(value).__name__}, which is no dataclass: decorate the class "
                "with @dataclass(frozen=True)"
            )
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if own.get("name", name) != name:
            raise UserError(
                f"{where} is registered as {name!r} and calls itself {own['name']!r}: "
                f"give the {self.kind} one name"
            )
        return value

    def _unknown(self, name: str) -> str:
        return f"unknown {self.kind} {name!r}: {suggestion(name, self.names(), 'known are')}"


def _lacks(value: object, base: type) -> str:
    """End of a message about something that has a part of a protocol's attributes."""
    if not getattr(base, "_is_protocol", False):
        return ""
    wanted = {*base.__annotations__, *vars(base)}
    wanted = {name for name in wanted if not name.startswith("_")}
    missing = sorted(name for name in wanted if not hasattr(value, name))
    return f"; it has no {' and no '.join(missing)}" if len(missing) < len(wanted) else ""


def _modules(package: str) -> Iterator[ModuleType]:
    """Import the modules directly inside `package`; a plain module stands for itself."""
    root = importlib.import_module(package)
    if not hasattr(root, "__path__"):
        yield root
        return
    for info in pkgutil.iter_modules(root.__path__):
        if not info.name.startswith("_"):
            yield _module(f"{package}.{info.name}")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:  # whoever adds a file makes mistakes in it
        raise UserError(f"{name} can't be imported ({fault(error)}): repair it") from error


METHODS: Registry[KVQuantizer | ForeignCache] = Registry(
    "method",
    ("kvbench.cache:KVQuantizer", "kvbench.cache:ForeignCache"),
    "kvbench.methods",
    "METHODS",
    "kvbench.methods",
    {"label": "builtins:str", "paper": "builtins:str", "needs": "kvbench.cache:Needs"},
)
MODELS: Registry[ModelEntry] = Registry(
    "model", "kvbench.models.zoo:ModelEntry", "kvbench.models.zoo", "MODELS", "kvbench.models"
)
TASKS: Registry[Task] = Registry(
    "task", "kvbench.tasks.base:Task", "kvbench.tasks", "TASKS", "kvbench.tasks"
)
