"""From a job's options to the method that they describe."""

from importlib import import_module
from typing import Any

from methods.base import Method, Setup
from methods.options import Options


def create(options: Options, setup: Setup | None = None) -> Method[Any]:
    """The method of these options; its module (and torch) is imported now."""
    module_name, class_name = options.implementation.split(":")
    module = import_module(module_name)
    class_ = getattr(module, class_name)
    method: Method[Any] = class_(options, setup or Setup())
    return method
