"""Headless Chromium, driven by its DevTools protocol over a WebSocket."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import websocket
from waiting import until

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-extensions")


class Tab:
    """A page in the browser."""

    def __init__(self, address: str) -> None:
        self.connection = websocket.create_connection(address, timeout=60, suppress_origin=True)
        self.number = 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Ask the browser for something; errors of the page that come meanwhile are kept."""
        self.number += 1
        self.connection.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv())
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def open(self, address: str) -> None:
        """Go to a page."""
        self.send("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait for an expression to be true; what it asks for may not be there yet."""
        return until(lambda: self.run(f"(() => {{ try {{ return {script} }} catch {{ return false }} }})()"))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a browser whose profile lies in a folder."""
    program = shutil.which("chromium")
    assert program
    process = subprocess.Popen(
        [program, *FLAGS, *QUIET, f"--user-data-dir={folder}", "--remote-debugging-port=0", "--window-size=1280,900"],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    port_file = folder / "DevToolsActivePort"
    try:
        until(lambda: port_file.exists() and port_file.read_text().count("\n"))
        port = port_file.read_text().split("\n")[0]
        (tab, *_) = until(lambda: httpx2.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json())
        yield Tab(tab["webSocketDebuggerUrl"])
    finally:
        process.terminate()
        process.wait(30)
