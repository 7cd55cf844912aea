"""The server's end of a command in a pod: a WebSocket with a channel for each stream (v5.channel.k8s.io).

The command runs on this machine, as a real process. A frame of the client has its length, a mask and the data
(RFC 6455); each begins with the number of its channel, and 255 before that number ends it.
"""

import base64
import hashlib
import json
import os
import struct
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

_MAGIC = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _BINARY, _CLOSE = 1, 2, 8
_STDIN, _STDOUT, _STDERR, _ENDING, _END = 0, 1, 2, 3, 255
PROTOCOL = "v5.channel.k8s.io"


def accept_key(key: str) -> str:
    """What a server answers to the key of a client."""
    return base64.b64encode(hashlib.sha1((key + _MAGIC).encode()).digest()).decode()


class Session:
    """One command, whose streams go over a socket that was upgraded."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], rfile: IO[bytes], wfile: IO[bytes]
    ) -> None:
        self._rfile = rfile
        self._wfile = wfile
        self._lock = threading.Lock()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=dict(environment), stdin=pipe, stdout=pipe, stderr=pipe)

    def run(self) -> None:
        """Carry everything until the command has ended, or the client is gone, with which the input ends."""
        threads = [
            threading.Thread(target=self._send_all, args=(_STDOUT, self.process.stdout), daemon=True),
            threading.Thread(target=self._send_all, args=(_STDERR, self.process.stderr), daemon=True),
        ]
        for thread in (*threads, threading.Thread(target=self._receive_all, daemon=True)):
            thread.start()
        for thread in threads:
            thread.join()
        code = self.process.wait()
        ending: dict[str, Any] = {"status": "Success"}
        if code:
            causes = [{"reason": "ExitCode", "message": str(code)}]
            ending = {"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}
        with suppress(OSError):
            self._send(_BINARY, bytes([_ENDING]) + json.dumps(ending).encode())
            self._send(_CLOSE, struct.pack("!H", 1000))

    def _send_all(self, channel: int, stream: IO[bytes]) -> None:
        with suppress(OSError):
            while data := os.read(stream.fileno(), 1 << 15):
                self._send(_BINARY, bytes([channel]) + data)

    def _send(self, opcode: int, data: bytes) -> None:
        length = len(data)
        size = struct.pack("!B", length) if length < 126 else struct.pack("!BH", 126, length)
        if length >= 1 << 16:
            size = struct.pack("!BQ", 127, length)
        with self._lock:
            self._wfile.write(bytes([0x80 | opcode]) + size + data)
            self._wfile.flush()

    def _receive_all(self) -> None:
        stdin = self.process.stdin
        assert stdin
        with suppress(OSError, ValueError):
            while (frame := self._receive()) is not None:
                opcode, data = frame
                if opcode == _CLOSE or data[:2] == bytes([_END, _STDIN]):
                    break
                if opcode in (_TEXT, _BINARY) and data[:1] == bytes([_STDIN]):
                    stdin.write(data[1:])
                    stdin.flush()
        with suppress(OSError):
            stdin.close()

    def _receive(self) -> tuple[int, bytes] | None:
        """A frame's opcode and data; None at the end of the connection."""
        head = self._rfile.read(2)
        if len(head) < 2:
            return None
        length = head[1] & 0x7F
        if length == 126:
            (length,) = struct.unpack("!H", self._rfile.read(2))
        elif length == 127:
            (length,) = struct.unpack("!Q", self._rfile.read(8))
        mask = self._rfile.read(4)
        masked = self._rfile.read(length)
        if len(masked) < length:
            return None
        repeated = (mask * (length // 4 + 1))[:length]
        data = int.from_bytes(masked, "big") ^ int.from_bytes(repeated, "big")
        return head[0] & 0x0F, data.to_bytes(length, "big")
