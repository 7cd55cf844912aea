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
Reasons = dict[str, str]  # a method's kind -> why it cannot be used


def defined_in(package: str) -> Kinds:
    """The options of each kind that the modules of a package define, module by module."""
    folder = import_module(package)
    kinds: Kinds = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = import_module(f"{package}.{info.name}")
        for value in vars(module).values():
            if not _is_method(value):
                continue
            if value.__module__ == module.__name__:  # and was not imported from another
                kind = _kind(value)
                kinds[kind] = value
    return kinds


def registered(taken: Kinds) -> tuple[Kinds, Reasons]:
    """The options that other packages register, by kind; and by kind why some of them cannot be used."""
    usable: Kinds = {}
    unusable: Reasons = {}
    points = entry_points(group=GROUP)
    for point in sorted(points, key=attrgetter("name", "value")):
        name = point.name
        try:
            names = taken.keys() | usable.keys()
            usable[name] = _loaded(point, names)
        except Exception as error:  # whatever a stranger's module raises, the other methods are there
            package = "a package"
            if point.dist:
                package = point.dist.name
            unusable[name] = f"{package} registers {point.value}: {error}"
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
    if not isinstance(value, type):
        return False
    if not issubclass(value, Options):
        return False
    kind = value.model_fields["kind"]
    return not kind.is_required()
