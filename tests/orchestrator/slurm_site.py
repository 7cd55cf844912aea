"""A real SLURM of several nodes on this machine, for tests: slurmctld, munge, and a slurmd for each node.

A node is a set of Linux namespaces: an address, a host name, processes and shared memory of its own. Killing its
first process is a power failure; its cable can be cut and healed. The nodes hang on a bridge in a namespace of its
own, which reaches nothing outside. A spare node is off until it is lent.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
# What a site does with namespaces, in some of its own.
_TRIAL = (
    "mount -t tmpfs tmpfs /dev/shm && ip link add br0 type bridge && ip link add name port0 type veth peer name port1"
)
WHY_NOT = f"needs root, Linux namespaces, and SLURM: apt-get install {' '.join(PACKAGES)}"

# The first process of a node: it gives it a name and waits for its cable, starts slurmd, and reaps what that leaves.
_INIT = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o mode=1777,size=2g tmpfs /dev/shm
trap 'exit 0' TERM
while [ ! -e "$2/$1.cable" ]; do sleep 0.05; done
cd /; env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 slurmd -D -f "$2/slurm.conf" &
while :; do wait -n 2>/dev/null; sleep 1 & wait $!; done
"""


def can_serve() -> bool:
    """Whether a site can be started here."""
    if os.geteuid() != 0 or not all(map(shutil.which, _PROGRAMS)):
        return False
    isolated = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--mount-proc"]
    return _works(*isolated, "sh", "-c", _TRIAL)


class SlurmSite:
    """A site with so many nodes, called node1, node2, ..., and a spare one behind them."""

    def __init__(self, folder: Path, nodes: int, cpus: int = 4, gpus: int = 0, settings: str = "") -> None:
        self.folder = folder
        *self.nodes, self.spare = [f"node{number}" for number in range(1, nodes + 2)]
        self.interface = f"ft{os.getpid() % 100_000}"
        self.network = f"10.213.{os.getpid() % 250 + 1}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(mode=0o755)
        self._configure(cpus, gpus, settings)

    @property
    def environment(self) -> dict[str, str]:
        """What SLURM's commands need to find it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "SlurmSite":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in (*self.nodes, self.spare):
            self._end(node)
        for name in ("slurmctld", "munged", "switch"):
            self._end(name)

    def kill(self, node: str) -> None:
        """A power failure: all that ran on the node is gone, and so is its cable."""
        self._end(node)
        self._in_switch("ip", "link", "del", self._port(node), check=False)
        (self.folder / f"{node}.cable").unlink()

    def boot(self, node: str) -> None:
        """Start a node."""
        command = ["unshare", "--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._spawn(node, [*command, "bash", "-c", _INIT, "bash", node, str(self.folder)])
        inner = self._await(lambda: self._children(node), f"{node} does not start")[0]
        ours = str(Path("/proc/self/ns/net").readlink())
        self._await(lambda: str(Path(f"/proc/{inner}/ns/net").readlink()) != ours, f"{node} has no network")
        port = self._port(node)
        self._in_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", inner)
        self._in_switch("ip", "link", "set", port, "master", "br0", "up")
        inside = ["nsenter", "-t", inner, "-n"]
        address = f"{self.network}.{self._number(node)}/24"
        for arguments in (["link", "set", "lo", "up"], ["addr", "add", address, "dev", "eth0"]):
            _run(*inside, "ip", *arguments)
        _run(*inside, "ip", "link", "set", "eth0", "up")
        (self.folder / f"{node}.cable").touch()

    @contextlib.contextmanager
    def spare_node(self) -> Iterator[None]:
        """A node more in the partition `low`, while the block runs."""
        self.boot(self.spare)
        self.run("scontrol", "update", "partitionname=low", f"nodes={','.join([*self.nodes, self.spare])}")
        states = ["sinfo", "-h", "-n", self.spare, "-p", "low", "-o", "%t"]
        self._await(lambda: self.run(*states).strip() == "idle", f"{self.spare} does not become idle", 60)
        try:
            yield
        finally:
            self.run("scontrol", "update", "partitionname=low", f"nodes={','.join(self.nodes)}")
            self.kill(self.spare)

    def cut(self, node: str) -> None:
        """Pull a node's cable; its processes run on."""
        self._in_switch("ip", "link", "set", self._port(node), "down")

    def heal(self, node: str) -> None:
        """Plug a node's cable in again."""
        self._in_switch("ip", "link", "set", self._port(node), "up")

    def restart_controller(self) -> None:
        """End slurmctld, and start it again."""
        self._end("slurmctld")
        self._start_controller()

    def signal_user_at_preemption(self, signals: bool) -> None:
        """Whether a preemption sends the signal of --signal, as sites may choose."""
        path = self.folder / "slurm.conf"
        kept = [line for line in path.read_text().splitlines() if not line.startswith("SlurmctldParameters")]
        chosen = ["SlurmctldParameters=preempt_send_user_signal"] if signals else []
        path.write_text("\n".join([*kept, *chosen]) + "\n")
        self.restart_controller()

    def run(self, *command: str) -> str:
        """What a command of SLURM prints."""
        return _run(*command, env=os.environ | self.environment)

    def run_on(self, node: str, *command: str) -> str:
        """What a command prints among the processes of a node."""
        return _run("nsenter", "-t", self._children(node)[0], "-p", "-m", "--", *command)

    def _start(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        socket_ = self.folder / "munge.sock"
        files = [f"--key-file={key}", f"--socket={socket_}", f"--pid-file={self.folder}/munged.pid"]
        files += [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed"]
        self._spawn("munged", ["munged", "--foreground", "--force", *files])
        self._await(lambda: _works("munge", "-n", f"--socket={socket_}"), "munged does not answer")
        self._spawn("switch", ["unshare", "--net", "--", "sleep", "infinity"])
        switch = str(self._processes["switch"].pid)
        ours = str(Path("/proc/self/ns/net").readlink())
        self._await(lambda: str(Path(f"/proc/{switch}/ns/net").readlink()) != ours, "no namespace for the switch")
        self._in_switch("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self._in_switch("ip", "link", "set", "br0", "up")
        _run("ip", "link", "add", self.interface, "type", "veth", "peer", "name", "ctl", "netns", switch)
        self._in_switch("ip", "link", "set", "ctl", "master", "br0", "up")
        _run("ip", "addr", "add", f"{self.network}.254/24", "dev", self.interface)
        _run("ip", "link", "set", self.interface, "up")
        self._start_controller()
        for node in self.nodes:
            self.boot(node)
        self._await(self._is_usable, "the nodes do not become idle", 60)

    def _start_controller(self) -> None:
        # It binds to the address that its host name resolves to: it must see our hosts file.
        script = 'mount --bind "$1/hosts" /etc/hosts && exec slurmctld -D -f "$1/slurm.conf"'
        environment = os.environ | self.environment
        self._spawn("slurmctld", ["unshare", "--mount", "--", "sh", "-c", script, "sh", str(self.folder)])
        self._await(lambda: _works("scontrol", "ping", env=environment), "slurmctld does not answer")

    def _is_usable(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %t").splitlines()
        return len(set(states)) == len(self.nodes) and all(line.endswith(" idle") for line in states)

    def _port(self, node: str) -> str:
        return f"p{self._number(node)}"

    def _number(self, node: str) -> int:
        return [*self.nodes, self.spare].index(node) + 1

    def _children(self, name: str) -> list[str]:
        pid = self._processes[name].pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def _in_switch(self, *command: str, check: bool = True) -> None:
        switch = str(self._processes["switch"].pid)
        _run("nsenter", "-t", switch, "-n", "--", *command, check=check)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is None:
            return
        if name in ("slurmctld", "munged"):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed then
                process.wait(timeout=5)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _await(self, look: Callable[[], Any], why_not: str, timeout_s: float = 30) -> Any:
        """The first thing that is true of what a look gives; raises AssertionError when nothing is for so long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # what is looked at is not there yet
                if found := look():
                    return found
            time.sleep(0.05)
        tails = [path.read_text(errors="replace")[-1000:] for path in self.folder.glob("*.out")]
        raise AssertionError(f"{why_not}\n" + "\n".join(tails))

    def _configure(self, cpus: int, gpus: int, settings: str) -> None:
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        for name in ("state", "spool", "devices"):
            (folder / name).mkdir()
        hosts = ["127.0.0.1 localhost", f"{self.network}.254 {host}"]
        lines = _CONFIG.format(folder=folder, host=host, network=self.network).splitlines()
        gres = f" Gres=gpu:{gpus}" if gpus else ""
        if gpus:
            lines.append("GresTypes=gpu")
            for number in range(gpus):
                _run("mknod", "-m", "666", str(folder / "devices" / f"nvidia{number}"), "c", "1", "3")
            devices = f"{folder}/devices/nvidia[0-{gpus - 1}]"
            (folder / "gres.conf").write_text(f"Name=gpu File={devices} Flags=nvidia_gpu_env\n")
        for number, node in enumerate([*self.nodes, self.spare], 1):
            hosts.append(f"{self.network}.{number} {node}")
            lines.append(
                f"NodeName={node} NodeAddr={self.network}.{number} CPUs={cpus} RealMemory=6000{gres} State=UNKNOWN"
            )
        nodes = ",".join(self.nodes)
        lines += [line.format(n=nodes) for line in _PARTITIONS] + settings.splitlines()
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")


_CONFIG = """ClusterName=tests
SlurmctldHost={host}({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=15
CommunicationParameters=NoCtldInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=5
BatchStartTimeout=10
UnkillableStepTimeout=20
ReturnToService=2
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
JobRequeue=1
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt"""
_PARTITIONS = [
    "PartitionName=main Nodes={n} Default=YES MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP",
    "PartitionName=low Nodes={n} MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP",
]


def _run(*command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
    """What a command prints; raises AssertionError with what it said where it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ran.returncode == 0 or not check, f"{' '.join(command)}: {ran.stderr.strip()}"
    return ran.stdout


def _works(*command: str, env: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, capture_output=True, env=env, check=False).returncode == 0


if __name__ == "__main__":
    with SlurmSite(Path(sys.argv[1]), 2) as site:
        print(site.run("sinfo"))
