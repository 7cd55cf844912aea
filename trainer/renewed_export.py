"""An exported adapter whose weights are renewed, again and again, while a model trains."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import equal, nn

from methods.base import Method, Tensors
from methods.parts.peft_adapter import ADAPTER
from serving.folder import Folder
from serving.format import LIMIT


class RenewedExport:
    """A method's adapter as it is now, as those read it who know no method.

    The method exports it into a folder. Where each tensor of its file is one of the weights, it does so once, and
    later weights stand in the places of those: PEFT's own way looks at every module of the model several times.
    """

    def __init__(self, method: Method[Any], model: nn.Module, folder: Path) -> None:
        self._method = method
        self._model = model
        self._folder = folder
        self._sources: dict[str, str] = {}  # the name of a weight, by that of its tensor in the file

    def folder(self, weights: Tensors) -> Folder:
        """The adapter with these weights, which are whole, on the host, and named as in the model."""
        if self._sources:
            renewed = {}
            for name, source in self._sources.items():
                renewed[name] = weights[source].contiguous()
            return Folder.renewed(self._folder, renewed)
        self._method.export(self._model, weights, self._folder)
        if self._method.config_is_fixed:
            self._find_sources(weights)
        return Folder.read(self._folder, LIMIT)

    def _find_sources(self, weights: Tensors) -> None:
        """Note which weight each tensor of the file is, if all of them are one."""
        files = [*self._folder.glob("*.safetensors")]
        if len(files) != 1:
            return
        named_as_exported = {}
        for name in weights:
            in_file = name.replace(f".{ADAPTER}", "")
            named_as_exported[in_file] = name
        exported = load_file(files[0])
        sources = {}
        for name, tensor in exported.items():
            source = named_as_exported.get(name)
            if source is None or tensor.dtype != weights[source].dtype or not equal(tensor, weights[source]):
                return
            sources[name] = source
        self._sources = sources
