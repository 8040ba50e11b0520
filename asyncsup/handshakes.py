"""Handshakes that libzmq ends by itself: of peers that speak no CURVE, or have another key for the server.

Who comes with a key of their own is asked about over ZAP (`remote.py`). Of the others libzmq says over a
monitor that a handshake has failed, and why; not whose it was.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Callable
from typing import Final

import zmq

from asyncsup.readable import is_readable

REASONS: Final = {
    int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH): "it has no key at all",
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): "it has another public key of the supervisor",
}
OTHERWISE: Final = "it does not keep to the protocol"
BATCH: Final = 256
"""Events that are read before the loop gets its turn."""

_EVENT: Final = struct.Struct("=HI")
_numbers = itertools.count(1)


class HandshakeWatch:
    """Reads what libzmq says of one socket. To be made before that is bound, and closed before it is closed.

    Args:
        on_failure: called with the reason; must not raise.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        on_failure: Callable[[str], None],
    ) -> None:
        self._socket = socket
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._events = context.socket(zmq.PAIR)
        self._events.linger = 0
        # libzmq waits for room, with all of its connections: whoever floods us must not make it.
        self._events.set(zmq.RCVHWM, 0)
        address = f"inproc://handshakes-{next(_numbers)}"
        socket.monitor(address, int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL))
        self._events.connect(address)
        self._fd: int = self._events.FD
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        # In this order: without a reader it would wait for one.
        self._socket.disable_monitor()
        self._events.close()

    def _drain(self) -> None:
        for _ in range(BATCH):
            # Only when this has said that there is nothing is the edge-triggered descriptor armed again.
            if self._events.closed or not is_readable(self._events):
                return
            _, reason = _EVENT.unpack_from(self._events.recv_multipart(zmq.NOBLOCK)[0])
            self._on_failure(REASONS.get(reason, OTHERWISE))
        self._loop.call_soon(self._drain)
