"""A real MLflow server on loopback that can be killed and started again, and what may stand before it."""

import base64
import contextlib
import http.server
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
        command, settings = ui_command(self.store, self.port)
        quiet = subprocess.DEVNULL
        environment = {**os.environ, **settings}
        self._process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
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


class Guard:
    """Lets through who knows the password, and answers others with a status, as a server with accounts does."""

    def __init__(self, port: int, password: str, status: int = 401) -> None:
        expected = f"Basic {base64.b64encode(f'ada:{password}'.encode()).decode()}"

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != expected:
                    self._answer(status, b"You are not authenticated.")
                    return
                headers = {"Content-Type": self.headers.get("Content-Type", "")}
                address = f"http://127.0.0.1:{port}{self.path}"
                request = urllib.request.Request(address, body or None, headers, method=self.command)
                try:
                    with urllib.request.urlopen(request) as answer:
                        self._answer(answer.status, answer.read())
                except urllib.error.HTTPError as error:
                    self._answer(error.code, error.read())

            do_POST = do_PATCH = do_PUT = do_GET

            def _answer(self, code: int, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


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
