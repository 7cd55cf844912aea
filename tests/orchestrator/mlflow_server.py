"""A real MLflow server on loopback that can be killed and started again, and a proxy that can hold requests."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

from ports import free_port

from orchestrator.tracking.store import ui_command


class Server:
    """`mlflow server` over a store, in a process group of its own, always on the same port."""

    def __init__(self, store: str) -> None:
        self.store, self.port = store, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self._process:
            return
        command = ui_command(self.store, self.port)
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)
        for _ in range(600):
            if self._healthy():
                return
            time.sleep(0.1)
        raise TimeoutError(f"no MLflow server at {self.uri}")

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class Proxy:
    """Forwards TCP to a port; requests whose first bytes contain `held` wait until `release`."""

    def __init__(self, port: int, held: bytes) -> None:
        self._port, self._held = port, held
        self.caught, self._go, self._answered = threading.Event(), threading.Event(), threading.Event()
        self.holding, self._status = True, b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def release(self) -> bytes:
        """Let what is held go, and wait for the server's answer: its status line."""
        self.holding = False
        self._go.set()
        assert self._answered.wait(20)
        self._socket.close()
        return self._status

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(connection,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            threading.Thread(target=_pipe, args=(far, near), daemon=True).start()
            while data := _receive(near):
                if self.holding and self._held in data:
                    self._deliver_late(data + _body(near))
                    return
                try:
                    far.sendall(data)
                except OSError:
                    return  # the server closed an idle connection, so this end is closed too

    def _deliver_late(self, request: bytes) -> None:
        """A held request reaches the server although its sender has gone."""
        self.caught.set()
        self._go.wait(60)
        with socket.create_connection(("127.0.0.1", self._port)) as far:
            far.sendall(request)
            self._status = _receive(far).split(b"\r\n")[0]
        self._answered.set()


def _pipe(source: socket.socket, sink: socket.socket) -> None:
    while data := _receive(source):
        with contextlib.suppress(OSError):  # the sender gave up; the answer still has to be drained
            sink.sendall(data)


def _receive(source: socket.socket) -> bytes:
    try:
        return source.recv(1 << 16)
    except OSError:
        return b""


def _body(near: socket.socket) -> bytes:
    """What else of a request arrives within a moment."""
    near.settimeout(0.3)
    data = b""
    try:
        while part := near.recv(1 << 16):
            data += part
    except TimeoutError:
        near.settimeout(None)
    return data
