"""Trainers for tests, forked from a process that has imported all that they need, which takes ten seconds."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch import cuda

from trainer.__main__ import main

ROOT = Path(__file__).parent.parent
OUTSIDE = str(ROOT / "tests" / "outside")  # what a user has installed beside: an objective of another package
FORKS = multiprocessing.get_context("forkserver")


def prepare(environment: Mapping[str, str]) -> None:
    """Start the process that the others are forked from, in this environment."""
    before = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "tests"), OUTSIDE, *filter(None, [environment.get("PYTHONPATH")])]
    _replace({**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)})
    if not cuda.is_available():  # which does not outlive a fork
        FORKS.set_forkserver_preload(["preloaded"])
    try:
        forkserver.ensure_running()
    finally:
        _replace(before)


def start(requests: Connection, environment: Mapping[str, str], log: Path) -> BaseProcess:
    """Start one that trains the run folders that it receives, answers each, and appends what it prints to `log`."""
    process = FORKS.Process(target=_serve, args=(requests, dict(environment), log))
    process.start()
    requests.close()
    return process


def _serve(requests: Connection, environment: dict[str, str], log: Path) -> None:
    _replace(environment)
    sys.path.append(OUTSIDE)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main(_received(requests))


def _received(requests: Connection) -> Iterator[Path]:
    """The runs that are asked for; asking for the next one means that the last is done."""
    while True:
        try:
            run_dir = Path(requests.recv())
        except EOFError:
            return
        yield run_dir
        with suppress(BrokenPipeError):  # nobody waits for it
            requests.send("done")


def _replace(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
