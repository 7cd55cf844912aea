"""`python -m clusters.pod_exec CONTEXT NAMESPACE COMMAND...`: a command in the pod that has the run folders.

Input, output and errors are those of this process, and so is its exit code: what ssh is for another machine. 255 says
that the connection failed, and not the command. An empty CONTEXT is the current one of the kubeconfig.
"""

import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from clusters.base import Unreachable
from clusters.kubernetes_answers import why_not_started
from clusters.kubernetes_api import KubernetesApi
from clusters.remote.link import BROKEN
from k8s.planned import READER_LABEL

_CHUNK_BYTES = 1 << 15
_OUTPUTS = (1, 2)  # channels of the protocol, which are descriptors of this process, too
_ENDING = 3  # the channel by which the server says how the command ended
_NO_READER = "there is no pod of the reader; it is made by: fleetune k8s install --cluster NAME"


def main(context: str, namespace: str, command: Sequence[str]) -> int:
    """Run a command in the reader's pod; gives its exit code, or BROKEN."""
    try:
        api = KubernetesApi(context or None, namespace)
        session = api.session(reader_pod(api), command)
    except Unreachable as error:
        print(error, file=sys.stderr)
        return BROKEN
    threading.Thread(target=send_input, args=(session,), daemon=True).start()
    try:
        return pass_output(session)
    except (OSError, RuntimeError) as error:
        print(f"Kubernetes: {error}", file=sys.stderr)
        return BROKEN


def reader_pod(api: KubernetesApi) -> str:
    """The name of a pod of the reader that is ready; raises Unreachable where there is none, and says why."""
    obstacle = _NO_READER
    for pod in api.pods(f"{READER_LABEL}=true"):
        if "deletionTimestamp" in pod["metadata"]:
            continue
        name = str(pod["metadata"]["name"])
        containers = pod["status"].get("containerStatuses", [])
        if containers and all(container["ready"] for container in containers):
            return name
        why = why_not_started(pod) or f"pod {name} has started, and is not ready yet"
        obstacle = f"no pod of the reader is ready: {why}"
    raise Unreachable(f"Kubernetes: namespace {api.namespace}: {obstacle}")


def send_input(session: Any) -> None:
    """Send what comes in, and the end of it; what a session that has ended does not take is for nobody."""
    with suppress(OSError, RuntimeError):
        while data := os.read(0, _CHUNK_BYTES):
            session.write_stdin(data)
        session.close_channel(0)


def pass_output(session: Any) -> int:
    """Pass on what the command prints until it ends; gives its exit code. Raises RuntimeError where there is none.

    Frames are taken from the socket: the client's own reading would keep all that ever came.
    """
    from websocket import ABNF, WebSocketException

    ending = b""
    try:
        while True:
            opcode, frame = session.sock.recv_data_frame(True)
            if opcode == ABNF.OPCODE_CLOSE:
                return exit_code_in(ending)
            if opcode in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
                channel, data = frame.data[0], frame.data[1:]
                if channel in _OUTPUTS:
                    write_all(channel, data)
                elif channel == _ENDING:
                    ending += data
    except WebSocketException as error:
        raise RuntimeError(f"the connection to the pod ended ({error})") from None


def exit_code_in(ending: bytes) -> int:
    """The exit code in the Status that a session ends with; raises RuntimeError where it has none."""
    try:
        status = json.loads(ending)
    except ValueError:
        raise RuntimeError("the connection to the pod ended before the command") from None
    if status["status"] == "Success":
        return 0
    for cause in (status.get("details") or {}).get("causes") or ():
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    raise RuntimeError(str(status.get("message")))


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of some bytes to a descriptor of this process."""
    while data:
        data = data[os.write(descriptor, data) :]


if __name__ == "__main__":
    os._exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))  # without waiting for the thread that reads the input
