"""A network between a client and a server on this host, which can be cut after any byte."""

import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress


class CutProxy:
    """Forwards what comes to its port to another one, and back, until it is told to cut that."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._left: dict[str, int] = {}
        self._cut: Callable[[], None] = self.cut
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, way: str, number: int, cut: Callable[[], None] | None = None) -> None:
        """Cut after so many more bytes of the way, `request` or `answer`; `cut` is what is done then."""
        self._cut = cut or self.cut
        self._left = {way: number}

    @property
    def was_cut(self) -> bool:
        """Whether it has come to that."""
        return not self._left

    def cut(self) -> None:
        """End all connections; new ones are forwarded again."""
        with self._lock:
            ended, self._open = self._open, []
        for end in ended:
            with suppress(OSError):  # the other side was faster
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Forward no more."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                with self._lock:
                    self._open += [client, server]
                for ends in ((client, server, "request"), (server, client, "answer")):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with suppress(OSError):  # cut
            while data := source.recv(1 << 16):
                left = self._left.get(way)
                if left is None or len(data) < left:
                    target.sendall(data)
                    if left is not None:
                        self._left[way] = left - len(data)
                    continue
                target.sendall(data[:left])
                self._left = {}
                self._cut()
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def cut_somewhere(proxy: CutProxy, rng: random.Random, kill_connection: Callable[[], None]) -> None:
    """Have the network cut, or the shared connection killed, in the middle of what a submission sends and hears."""
    way, most = rng.choice([("request", 12_000), ("answer", 6_000)])
    proxy.cut_after(way, rng.randrange(1, most), rng.choice([None, kill_connection]))
