"""What starting Ray takes, whoever starts it: its command and environment, free ports, a token for who joins."""

import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clusters.machine import cores, gpus

OBJECT_STORE_BYTES = 128 << 20  # nothing large goes through it


def node_options(address: str, folder: Path) -> dict[str, object]:
    """What any node is told: the address that it has, and the short folder for all of Ray's files."""
    return {
        "node-ip-address": address,
        "temp-dir": folder,
        "num-cpus": cores(),
        "num-gpus": gpus(),
        "object-store-memory": OBJECT_STORE_BYTES,
        "dashboard-agent-listen-port": 0,
    }


def head_options(address: str, port: int) -> dict[str, object]:
    """What a head is told beside that; port 0 is any."""
    dashboard, client = free_ports(2, address)
    return {
        "port": port,
        "dashboard-host": address,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        # Ray Train frees the capacity of a killed driver by asking the dashboard.
        "include-dashboard": "true",
        "include-log-monitor": "false",
    }


def ray_command(
    options: Mapping[str, object],
    flags: Sequence[str] = (),
    module: str = "ray.scripts.scripts",
    python: Sequence[str] = (sys.executable,),
) -> list[str]:
    """The command that becomes a node, and ends when that ends; `module` has Ray's command line."""
    command = [*python, "-P", "-m", module, "start"]
    command += flags
    command.append("--block")
    for name, value in options.items():
        command.append(f"--{name}={value}")
    return command


def ray_environment(token: Path) -> dict[str, str]:
    """What Ray's processes and those that connect to its head need."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }


def write_token(path: Path) -> None:
    """Write a new token that its owner alone can read, whole or not at all."""
    new = path.with_suffix(f".{os.getpid()}")
    new.touch(mode=0o600)
    new.write_text(secrets.token_hex(32))
    new.replace(path)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def free_ports(number: int, address: str) -> list[int]:
    """Ports of an address of this host that nobody listens at now."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind((address, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
