"""A real sshd on loopback: another machine as far as ssh can tell, with keys and a HOME of its own."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ports import free_port

from clusters.remote.cluster import RemoteCluster
from orchestrator import backends

WHY_NOT = "needs root and OpenSSH's server: apt-get install openssh-server"


def can_serve() -> bool:
    """Whether a server can be started here."""
    return os.geteuid() == 0 and shutil.which("sshd") is not None and shutil.which("ssh") is not None


@dataclass(frozen=True)
class SshServer:
    """A server that runs; `binaries` comes first on PATH, and has an ssh that knows the host alias `there`."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int

    @property
    def home(self) -> Path:
        """The HOME of who logs in."""
        return self.folder / "home"

    @property
    def binaries(self) -> Path:
        """A folder with the ssh that reads our configuration instead of the user's."""
        return self.folder / "bin"

    def alias(self, name: str, port: int) -> None:
        """Let a host alias be the same server behind another port."""
        known = f" HostKeyAlias [127.0.0.1]:{self.port}\n"
        config = self.folder / "ssh_config"
        config.write_text(f"Host {name}\n Port {port}\n{known}{config.read_text().replace('Host there', 'Host *')}")

    def kill_connection(self, alias: str, sockets: Path) -> None:
        """Kill the process on this side that has the shared connection to an alias."""
        said = self._control("check", alias, sockets)  # Master running (pid=123)
        if found := re.search(r"pid=(\d+)", said):
            os.kill(int(found[1]), signal.SIGKILL)

    def close_connection(self, alias: str, sockets: Path) -> None:
        """End the shared connection to an alias, and no other one."""
        self._control("exit", alias, sockets)

    def _control(self, what: str, alias: str, sockets: Path) -> str:
        command = [self.binaries / "ssh", "-o", f"ControlPath={sockets}/%C", "-O", what, alias]
        return subprocess.run(command, capture_output=True, text=True).stderr

    def end(self) -> None:
        """End the server and every connection of it."""
        subprocess.run(["pkill", "-KILL", "-P", str(self.process.pid)], check=False)
        self.process.kill()
        self.process.wait()


def close_far_sides() -> None:
    """End the processes that this one has started over links, and forget all clusters that it has opened."""
    for cluster in backends._opened.values():
        if isinstance(cluster, RemoteCluster):
            cluster.far_side.close()
    backends._opened.clear()


@contextmanager
def ssh_server(folder: Path) -> Iterator[SshServer]:
    """A server below `folder`, which must be short: sockets have paths of at most 107 bytes."""
    port = free_port()
    for name in ("home", "bin", "noise"):
        (folder / name).mkdir(parents=True)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\n"
        f"PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
        f"SetEnv HOME={folder}/home\nMaxSessions 50\n"
    )
    host_key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "ssh_config").write_text(
        f"Host there\n HostName 127.0.0.1\n Port {port}\n User root\n IdentityFile {folder}/user\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {folder}/known_hosts\n RemoteCommand tmux new -A\n"
    )
    ssh = folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    command = [str(shutil.which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "log").open("wb") as log:
        server = SshServer(subprocess.Popen(command, stderr=log), folder, port)
    try:
        _wait_until_it_listens(server, port)
        yield server
    finally:
        server.end()


def _wait_until_it_listens(server: SshServer, port: int) -> None:
    probe = ["ssh-keyscan", "-T", "1", "-p", str(port), "127.0.0.1"]
    for _ in range(100):
        assert server.process.poll() is None, (server.folder / "log").read_text()
        if subprocess.run(probe, capture_output=True).stdout:
            return
        time.sleep(0.1)
    raise AssertionError("sshd does not listen")
