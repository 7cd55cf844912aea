"""Importing the libraries that a worker trains with, without what they bring along for other uses.

DeepSpeed's tuner imports MLflow, and bitsandbytes compiles its reference functions as it is imported, with all of
torch's compiler. A worker uses neither: without them it starts in three quarters of the time.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


def import_lean() -> None:
    """Import DeepSpeed and, where it is installed, bitsandbytes, which PEFT imports as well."""
    with _absent("mlflow"):
        import deepspeed  # noqa: F401
    with _uncompiled(), suppress(ImportError):  # not installed: the methods that need it say so
        import bitsandbytes  # noqa: F401


@contextmanager
def _absent(module: str) -> Iterator[None]:
    """Within it, a module that was not imported before is as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]  # what `import` takes for a module that is not there
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Within it, `torch.compile` gives a function back as it is."""

    def unchanged(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
        if function is None:
            return unchanged
        return function

    real = torch.compile
    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real
