"""An exported adapter whose weights are written anew, again and again, while a model trains."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import equal, nn

from methods.base import Method, Tensors
from methods.parts.peft_adapter import ADAPTER


class RenewedExport:
    """A folder with a method's adapter as it is now.

    The method exports it the first time. Where each tensor of the file is then one of the weights, later ones are
    written in their places: PEFT's own way looks at every module of the model several times, and writes a card.
    """

    def __init__(self, method: Method[Any], model: nn.Module, folder: Path) -> None:
        self._method = method
        self._model = model
        self.folder = folder
        self._file: Path | None = None  # of the weights, once it is known which is which
        self._sources: dict[str, str] = {}  # the name of a weight, by that of its tensor in the file

    def write(self, weights: Tensors) -> None:
        """Have these weights in the folder, which are whole, on the host, and named as in the model."""
        if self._file is not None:
            renewed = {}
            for name, source in self._sources.items():
                renewed[name] = weights[source].contiguous()
            save_file(renewed, self._file, metadata={"format": "pt"})
            return
        self._method.export(self._model, weights, self.folder)
        if self._method.config_is_fixed:
            self._find_sources(weights)

    def _find_sources(self, weights: Tensors) -> None:
        """Note which weight each tensor of the file is, if all of them are one."""
        files = [*self.folder.glob("*.safetensors")]
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
        self._file = files[0]
        self._sources = sources
