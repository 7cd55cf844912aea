"""What a gateway needs of what computes its answers: an engine in this process, or replicas elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.gateway.adapter_files import AdapterFiles
from serving.gateway.stream import TokenStream
from serving.sequence import Request


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read: its identity, and the tokens that it puts in front of every prompt."""

    digest: str
    virtual: int


class Answering(Protocol):
    """Computes answers, with adapters by name."""

    @property
    def positions(self) -> int:
        """Positions of a sequence, at most."""

    @property
    def broken(self) -> bool:
        """Whether nothing can be answered any more."""

    def start(self) -> None:
        """Begin to wait for work."""

    def stop(self) -> None:
        """Give up what is under way, and end."""

    def load_folder(self, name: str, folder: Path) -> Loaded:
        """Let a name mean the adapter of a folder, before `start`; raises AdapterRefused."""

    async def load_files(self, name: str, files: AdapterFiles) -> Loaded:
        """Let a name mean an adapter that nobody has checked yet; raises AdapterRefused."""

    async def unload(self, name: str) -> None:
        """Forget a name; what was asked with it is answered still."""

    async def resident(self) -> set[str]:
        """The digests of the adapters on the device."""

    async def submit(self, requests: list[Request]) -> list[TokenStream]:
        """Let requests wait for their turn, all or none; raises ApiRefusal."""

    def cancel(self, stream: TokenStream) -> None:
        """Let a stream end as it is, whose reader has gone or has enough."""
