"""Many adapters on one base: engine, adapter pool, evaluation.

    from serving import Engine, Request

Nothing is imported before it is needed: who reads plain data of this package alone needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engine import Engine as Engine
    from serving.error import AdapterRefused as AdapterRefused
    from serving.error import BaseRefused as BaseRefused
    from serving.error import RequestRefused as RequestRefused
    from serving.error import UnknownAdapter as UnknownAdapter
    from serving.pool import Pool as Pool
    from serving.sequence import Request as Request

_MODULE_OF = {
    "AdapterRefused": "serving.error",
    "BaseRefused": "serving.error",
    "Engine": "serving.engine",
    "Pool": "serving.pool",
    "Request": "serving.sequence",
    "RequestRefused": "serving.error",
    "UnknownAdapter": "serving.error",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    module = import_module(_MODULE_OF[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
