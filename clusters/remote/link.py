"""How a command is run where a cluster is: on this host, or over one OpenSSH connection that is reused.

A command is a list of arguments and is quoted once, here. A link gives the process to start for it; nobody builds
shell lines from values.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from runfolder.folders import home

BROKEN = 255  # the exit code by which ssh says that the link failed, and not the command
_CONNECT_S = 15  # until a connection is there
_ALIVE_S = 10  # between two questions whether the other end is still there, ...
_MISSED = 3  # ... and how many may stay without an answer
_PERSIST_S = 600  # how long a connection outlives the last command that used it
_LONGEST_SOCKET = 60  # characters of the folder of a socket, whose whole path may have 103


class Link(Protocol):
    """A way to run commands where a cluster is."""

    def process(self, command: Sequence[str]) -> list[str]:
        """The arguments of the process on this machine that runs a command there; it never prompts."""
        ...

    def foreground(self) -> list[str]:
        """The command by which a person opens the connection; empty where there is none to open."""
        ...

    def remedy(self, stderr: str) -> str:
        """What to do about a link that is broken, by what its process printed."""
        ...


@dataclass(frozen=True)
class ThisHost:
    """The machine that this process is on."""

    def process(self, command: Sequence[str]) -> list[str]:
        """The command itself, as it is."""
        return [*command]

    def foreground(self) -> list[str]:
        """No command: there is no connection."""
        return []

    def remedy(self, stderr: str) -> str:  # noqa: ARG002
        """Nothing can be broken between this host and itself."""
        return ""


@dataclass(frozen=True)
class Ssh:
    """Another machine over OpenSSH: its configuration, keys, host aliases and jump hosts are the user's own.

    All commands share one connection (ControlMaster). Host keys are checked, and nothing is asked: a connection that
    needs a password or a second factor is opened in the foreground by `foreground`.
    """

    destination: str
    connect: str = ""  # the command that a person types to open the connection

    def process(self, command: Sequence[str]) -> list[str]:
        """ssh with the command, quoted for the login shell of the other end."""
        unattended = _pairs({"BatchMode": "yes"})
        options = [*self._options(), *unattended]
        quoted = shlex.join(command)
        return ["ssh", "-T", *options, "--", self.destination, quoted]

    def foreground(self) -> list[str]:
        """ssh that opens the shared connection, may ask for what it needs, and goes to the background."""
        options = self._options()
        return ["ssh", "-f", "-N", *options, "--", self.destination]

    def remedy(self, stderr: str) -> str:
        """The command to type, by what ssh said."""
        if "Host key verification failed" in stderr:
            return f"; look at its host key once with: ssh {self.destination}"
        if "Permission denied (" in stderr and self.connect:  # ssh's own, with the ways to log in
            return f"; open the connection with: {self.connect}"
        return ""

    def _options(self) -> list[str]:
        socket = sockets_folder() / "%C"
        return _pairs(
            {
                "ControlMaster": "auto",
                "ControlPath": str(socket),
                "ControlPersist": str(_PERSIST_S),
                "StrictHostKeyChecking": "yes",
                "ConnectTimeout": str(_CONNECT_S),
                "ServerAliveInterval": str(_ALIVE_S),
                "ServerAliveCountMax": str(_MISSED),
                "ClearAllForwardings": "yes",
                "RequestTTY": "no",
                "RemoteCommand": "none",
            }
        )


def sockets_folder() -> Path:
    """Where the sockets of shared connections are: in FLEETUNE_HOME, or where its path is too long, in /tmp."""
    folder = home() / "links"
    if len(os.fsencode(folder)) > _LONGEST_SOCKET:
        folder = Path("/tmp") / f"fleetune-{os.getuid()}"  # TMPDIR may be as long
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise OSError(0, "it is of another user, or open to others", str(folder))
    return folder


def _pairs(options: dict[str, str]) -> list[str]:
    """Options as ssh takes them on its command line."""
    arguments = []
    for name, value in options.items():
        arguments += ["-o", f"{name}={value}"]
    return arguments
