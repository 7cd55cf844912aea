"""Readers of a job's rows for tests, forked from a process that has imported transformers, which takes two seconds.

`python forked_reader.py serve DESCRIPTOR` is that process. `python forked_reader.py SOCKET` asks it for a reader with
this one's input, outputs, folder and environment, and ends as that ends. It stands for
`python -m trainer.data`, which the tests of the command line start themselves.
"""

import json
import os
import socket
import sys
from pathlib import Path

_MOST = 1 << 20  # bytes of a request


def ask(address: str) -> int:
    """Have a reader forked that stands for this process; gives its exit code."""
    request = json.dumps({"folder": str(Path.cwd()), "environment": dict(os.environ)})
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [request.encode() + b"\n"], [0, 1, 2])
        return int(server.recv(8) or b"1")


def serve(listener: socket.socket) -> None:
    """Fork a reader for each that asks, one after the other."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as `python -m trainer.data` has it
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    import trainer.data.__main__
    import trainer.data.tokens  # noqa: F401

    while True:
        asking, _ = listener.accept()
        with asking:
            text, descriptors = b"", []
            while not text.endswith(b"\n"):
                part, received, _, _ = socket.recv_fds(asking, _MOST, 3)
                text += part
                descriptors += received
            pid = os.fork()
            if pid == 0:
                _read(json.loads(text), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            asking.send(str(os.waitstatus_to_exitcode(status)).encode())


def _read(request: dict[str, object], descriptors: list[int]) -> None:
    """Be the reader that was asked for, and end."""
    import traceback

    from trainer.data.__main__ import main

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    code = 1
    try:
        os.chdir(str(request["folder"]))
        os.environ.clear()
        os.environ.update(request["environment"])  # type: ignore[arg-type]
        main(json.load(sys.stdin))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    sys.exit(ask(sys.argv[1]))
