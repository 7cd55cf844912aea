"""`python -m orchestrator.served RUN_DIR`: the server of a service, which ends with the controller that started it.

It drains when it is told to, and when its standard input ends: then its controller is gone.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.serve import Serving, serve
from runfolder.record import load_any_job
from runfolder.service import ServiceSpec

EVERYWHERE = "0.0.0.0"  # who asks without a key gets nothing
REFUSED = 2  # exit code


def main(run_dir: Path) -> int:
    """Serve until a signal says to end; gives the exit code."""
    service = load_any_job(run_dir)
    assert isinstance(service, ServiceSpec)
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        serve(serving_of(service, run_dir))
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        return REFUSED
    return 0


def serving_of(service: ServiceSpec, run_dir: Path) -> Serving:
    """What `fleetune serve` is asked for; what tenants used is kept beside the attempts, which share it."""
    adapters = []
    for name, folder in service.adapters.items():
        adapters.append(f"{name}={folder}")
    tenants = Path(service.tenants)
    usage = run_dir / "usage"
    return Serving(service.base, tuple(adapters), tenants, EVERYWHERE, 0, None, usage)


def _end_with_input() -> None:
    """Have this process drain when nobody holds its standard input any more."""
    while os.read(sys.stdin.fileno(), 4096):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    exit_code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # without waiting for a thread that waits for its input
