"""`python container.py COMMAND...`: a container, as a tree of processes that ends as a whole.

It ends with its command, whose exit code it gives. SIGTERM is passed to the command. The end of the standard input is
a power failure: whoever started this can do it, and does it by dying.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_KILLED = 137


def main(command: list[str]) -> None:
    """Run a command until it ends, and all that it started; this process ends with it."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("what loses its parent in this container would get another one outside of it")
    with subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL) as process:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(process.pid, signal.SIGTERM))
        threading.Thread(target=_fail_with_power, daemon=True).start()
        with suppress(ChildProcessError):
            while True:
                pid, status = os.wait()
                if pid == process.pid:
                    _kill_children()
                    os._exit(os.waitstatus_to_exitcode(status) % 256)
        threading.Event().wait()  # the power has failed, and all are killed


def _fail_with_power() -> None:
    while os.read(0, 1):
        pass
    _kill_children()
    os._exit(_KILLED)


def _kill_children() -> None:
    """Kill the children of this process, and the children of these, which are this process's then, and so on."""
    while True:
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


def _children() -> list[int]:
    own = str(os.getpid())
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if parent == own:
                found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
