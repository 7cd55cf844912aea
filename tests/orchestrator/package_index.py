"""A place where pip finds one small package, over HTTP on loopback, which answers when the test lets it."""

import io
import sysconfig
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clusters.remote.lock import Lock

WHEEL = "tiny_packages-1-py3-none-any.whl"
LOCK = Lock("tiny-packages==1\n", "")


@dataclass
class PackageIndex:
    """What was asked, and whether it is answered: `asked` is set by the first request, `open` lets answers out."""

    url: str = ""
    is_empty: bool = False
    downloads: int = 0
    asked: threading.Event = field(default_factory=threading.Event)
    open: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let nobody have an answer before the end of the block, or `open.set()`."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()


@contextmanager
def package_index() -> Iterator[PackageIndex]:
    """An index that lasts as long as the block, and is open at first."""
    index = PackageIndex()
    index.open.set()
    wheel = tiny_wheel()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.asked.set()
            index.open.wait()
            is_wheel = self.path.endswith(".whl")
            index.downloads += is_wheel
            page = "" if index.is_empty else f'<a href="{WHEEL}">{WHEEL}</a>'
            body = wheel if is_wheel else page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing of requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield index
    finally:
        index.open.set()
        server.shutdown()
        server.server_close()


def tiny_wheel() -> bytes:
    """A package by which an environment has all that this one has: it names our folder of packages."""
    info = "tiny_packages-1.dist-info"
    files = {
        "tiny_packages.pth": sysconfig.get_path("purelib") + "\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-packages\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return stream.getvalue()
