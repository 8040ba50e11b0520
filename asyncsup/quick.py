"""One question on a connection of its own, without libzmq.

Loading libzmq and starting its threads takes longer than everything else `asyncsup status` does together. For
one request and one answer over a UNIX socket, the part of ZMTP 3.0 that is needed is small
(https://rfc.zeromq.org/spec/23/): a greeting and a READY each way, then frames. To the supervisor this is a
DEALER like any other.
"""

from __future__ import annotations

import struct
import time
from typing import Any, Final

from asyncsup.endpoint import connect
from asyncsup.errors import SupervisorUnreachableError
from asyncsup.rpc import Params, decode, encode_request, result_of, timed_out, went_away

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024

_GREETING: Final = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_READY: Final = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
_MORE, _LONG, _COMMAND = 1, 2, 4


def ask(endpoint: str, method: str, params: Params, *, timeout: float) -> Any:
    """Call ``method`` at an ``ipc://`` endpoint; as `asyncsup.client.ControlClient.call`.

    Args:
        timeout: how long to wait for the answer (seconds).
    """
    connection = _Connection(endpoint, time.monotonic() + timeout)
    sent = False
    try:
        connection.open()
        sent = True  # as good as: Ctrl-C may come when it has left and we do not know it yet
        connection.send(encode_request(1, method, params))
        while True:
            answer = decode(connection.receive())
            if answer is not None and answer.get("id") == 1:
                return result_of(answer)
    except TimeoutError:
        if sent:
            connection.cancel()
        raise timed_out(method, timeout) from None
    except (EOFError, OSError):
        raise went_away(endpoint, method) from None
    except KeyboardInterrupt:
        if sent:
            connection.cancel()
        raise
    finally:
        connection.close()


class _Connection:
    """ZMTP 3.0, NULL mechanism, over a UNIX socket. Raises EOFError, TimeoutError and OSError."""

    def __init__(self, endpoint: str, deadline: float) -> None:
        self._endpoint = endpoint
        self._deadline = deadline
        self._socket = connect(endpoint)

    def open(self) -> None:
        self._put(_GREETING)
        # libzmq drops a peer that says READY before it has seen the greeting.
        greeting = self._get(64)
        if greeting[:1] != b"\xff" or greeting[9] & 1 == 0 or greeting[10] < 3:
            raise SupervisorUnreachableError(f"what listens at {self._endpoint} is not a supervisor")
        self._put(bytes([_COMMAND, len(_READY)]) + _READY)

    def send(self, body: bytes) -> None:
        flags, size = (_LONG, ">BQ") if len(body) > 255 else (0, ">BB")
        self._put(struct.pack(size, flags, len(body)) + body)

    def receive(self) -> bytes:
        """The last frame of the next message; commands are ours to deal with."""
        while True:
            flags = self._get(1)[0]
            size = struct.unpack(">Q", self._get(8))[0] if flags & _LONG else self._get(1)[0]
            if size > MAX_ANSWER_BYTES:
                raise EOFError
            body = self._get(size)
            if flags & _COMMAND:
                self._obey(body)
            elif not flags & _MORE:
                return body

    def cancel(self) -> None:
        """Tell the supervisor that nobody waits any more; it may not be there to hear it."""
        self._deadline = time.monotonic() + 0.2
        try:
            self.send(encode_request(2, "cancel", {"id": 1}))
        except OSError:
            return

    def close(self) -> None:
        self._socket.close()

    def _obey(self, command: bytes) -> None:
        if command.startswith(b"\x05ERROR"):
            raise EOFError
        if command.startswith(b"\x04PING"):
            pong = b"\x04PONG" + command[7:]
            self._put(bytes([_COMMAND, len(pong)]) + pong)

    def _put(self, data: bytes) -> None:
        self._wait()
        self._socket.sendall(data)

    def _get(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._wait()
            piece = self._socket.recv(min(count - len(data), 1 << 18))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait(self) -> None:
        """Have the next call on the socket end at the deadline."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining)
