"""From a job's options to the method that they describe."""

from importlib import import_module
from typing import Any

from methods.base import Method, Setup
from methods.options import Options


def create(options: Options, setup: Setup | None = None) -> Method[Any]:
    """The method of these options; its module (and torch) is imported now."""
    module, name = options.implementation.split(":")
    method: Method[Any] = getattr(import_module(module), name)(options, setup or Setup())
    return method
