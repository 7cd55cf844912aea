"""Which methods there are: those of this folder, and those that other packages register.

A package registers a method as an entry point of the group `fleetune.methods`, whose name is the method's kind and
whose value is its class of options. Nothing heavier than the options is imported.
"""

import pkgutil
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import TypeGuard

from methods.options.base import Options

GROUP = "fleetune.methods"


Kinds = dict[str, type[Options]]  # a method's kind -> the class of its options


def defined_in(package: str) -> Kinds:
    """The options of each kind that the modules of a package define, module by module."""
    path = import_module(package).__path__
    modules = []
    for info in pkgutil.iter_modules(path):
        module = import_module(f"{package}.{info.name}")
        modules.append(module)
    kinds: Kinds = {}
    for module in modules:
        for value in vars(module).values():
            if _is_method(value) and value.__module__ == module.__name__:
                kinds[_kind(value)] = value
    return kinds


def registered(taken: Kinds) -> tuple[Kinds, dict[str, str]]:
    """The options that other packages register, by kind; and by kind why some of them cannot be used."""
    usable: Kinds = {}
    unusable: dict[str, str] = {}
    points = entry_points(group=GROUP)
    for point in sorted(points, key=attrgetter("name", "value")):
        try:
            names = taken.keys() | usable.keys()
            usable[point.name] = _loaded(point, names)
        except Exception as error:  # whatever a stranger's module raises, the other methods are there
            package = "a package"
            if point.dist:
                package = point.dist.name
            unusable[point.name] = f"{package} registers {point.value}: {error}"
    return usable, unusable


def _loaded(point: EntryPoint, taken: set[str]) -> type[Options]:
    """The options of an entry point; ValueError for a kind that is taken or wrong, TypeError for no options."""
    if point.name in taken:
        raise ValueError("another method has this kind already")
    options = point.load()
    if not _is_method(options):
        raise TypeError("this is no subclass of methods.options.Options with a default for `kind`")
    kind = _kind(options)
    if kind != point.name:
        raise ValueError(f"its kind is {kind!r}; allowed: the name of its entry point, {point.name!r}")
    return options


def _kind(options: type[Options]) -> str:
    """The kind that a class of options stands for."""
    kind: str = options.model_fields["kind"].default
    return kind


def _is_method(value: object) -> TypeGuard[type[Options]]:
    """Whether something is a class of options that stands for a method, and not what several have in common."""
    if not isinstance(value, type) or not issubclass(value, Options):
        return False
    kind = value.model_fields["kind"]
    return not kind.is_required()
