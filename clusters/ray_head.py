"""The Ray head of the local cluster: its own temporary folder, ports and token, on loopback alone."""

import hashlib
import os
import secrets
import shutil
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from clusters import process
from clusters.machine import cores, gpus

START_S = 180.0  # after this long without an answer a head is taken for dead
_OBJECT_STORE = 128 << 20  # bytes; nothing large goes through it


@dataclass
class Patience:
    """When to start something again that keeps dying: after 1, 2, 4 ... 30 s, and at once when it lived for long."""

    quick_s: float = 5.0
    _deaths: int = 0
    _began: float | None = None
    _next: float = 0.0

    def began(self) -> None:
        """Note a start."""
        self._began = time.monotonic()

    def ready(self) -> bool:
        """Asked while it is dead: whether to start it now."""
        if self._began is not None:
            quick = time.monotonic() - self._began < self.quick_s
            self._deaths = self._deaths + 1 if quick else 0
            self._next = time.monotonic() + (min(30.0, 2.0 ** (self._deaths - 1)) if quick else 0.0)
            self._began = None
        return time.monotonic() >= self._next


@dataclass
class Head:
    """One Ray head per state folder. `keep` is called again and again."""

    folder: Path
    _patience: Patience = field(default_factory=Patience)
    _answered: float = field(default_factory=time.monotonic)

    @property
    def lock(self) -> Path:
        """Held by the head while it lives."""
        return self.folder / "ray.lock"

    @property
    def temporary(self) -> Path:
        """Ray's folder: short, as the paths of its sockets may have 107 bytes."""
        name = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:10]
        return Path("/tmp") / f"fleetune-{os.getuid()}-{name}"

    def address(self) -> str | None:
        """Where the head says that it is; None while it has not said so."""
        try:
            return (self.temporary / "ray_current_cluster").read_text().strip() or None
        except FileNotFoundError:
            return None

    def keep(self) -> str | None:
        """The address of a head that answers; None while one starts."""
        if process.owner(self.lock) is None:
            if self._patience.ready():
                self._start()
            return None
        address = self.address()
        if address and answers(address):
            self._answered = time.monotonic()
            return address
        if time.monotonic() - self._answered > START_S:
            process.end(self.lock)
        return None

    def end(self) -> None:
        """Kill the head and all of its processes."""
        process.end(self.lock)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def environment(self) -> dict[str, str]:
        """What Ray's processes and those that connect to the head need."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token()),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Without this Ray turns 127.0.0.1 into the machine's own address, and listens there.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_worker_niceness": "0",
        }

    def _start(self) -> None:
        self.end()
        self.temporary.mkdir(mode=0o700)
        self._patience.began()
        self._answered = time.monotonic()
        process.spawn(self.lock, self._command(), os.environ | self.environment(), self.folder / "ray.log")

    def _command(self) -> list[str]:
        dashboard, client = free_ports(2)
        options = {
            "node-ip-address": "127.0.0.1",
            "port": 0,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": 0,
            "ray-client-server-port": client,
            # Ray Train frees the room of a killed driver by asking the dashboard.
            "include-dashboard": "true",
            "include-log-monitor": "false",
            "temp-dir": self.temporary,
            "num-cpus": cores(),
            "num-gpus": gpus(),
            "object-store-memory": _OBJECT_STORE,
        }
        flags = ["--head", "--block", "--no-monitor", "--disable-usage-stats"]
        values = [f"--{key}={value}" for key, value in options.items()]
        return [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *flags, *values]

    def _token(self) -> Path:
        path = self.folder / "ray_token"
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32))
            temporary.replace(path)
        return path


def answers(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens at now."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
