"""Which methods there are: those of this folder, and those that other packages register.

A package registers a method as an entry point of the group `fleetune.methods`, whose name is the method's kind and
whose value is its class of options. Nothing heavier than the options is imported.
"""

import pkgutil
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeGuard

from methods.options.base import Options

GROUP = "fleetune.methods"


def own(package: str) -> dict[str, type[Options]]:
    """The options of each kind that the modules of a package define, module by module."""
    path = import_module(package).__path__
    modules = [import_module(f"{package}.{found.name}") for found in pkgutil.iter_modules(path)]
    return {
        options.model_fields["kind"].default: options
        for module in modules
        for options in vars(module).values()
        if _is_method(options) and options.__module__ == module.__name__
    }


def registered(taken: dict[str, type[Options]]) -> tuple[dict[str, type[Options]], dict[str, str]]:
    """The options that other packages register, by kind; and by kind why some of them cannot be used."""
    usable: dict[str, type[Options]] = {}
    unusable: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        try:
            usable[point.name] = _loaded(point, taken.keys() | usable.keys())
        except Exception as error:  # whatever a stranger's module raises, the other methods are there
            package = point.dist.name if point.dist else "a package"
            unusable[point.name] = f"{package} registers {point.value}: {error}"
    return usable, unusable


def _loaded(point: EntryPoint, taken: set[str]) -> type[Options]:
    if point.name in taken:
        raise ValueError("another method has this kind already")
    options = point.load()
    if not _is_method(options):
        raise TypeError("this is no subclass of methods.options.Options with a default for `kind`")
    kind = options.model_fields["kind"].default
    if kind != point.name:
        raise ValueError(f"its kind is {kind!r}; allowed: the name of its entry point, {point.name!r}")
    return options


def _is_method(found: object) -> TypeGuard[type[Options]]:
    """Whether something is a class of options that stands for a method, and not what several have in common."""
    return isinstance(found, type) and issubclass(found, Options) and not found.model_fields["kind"].is_required()
