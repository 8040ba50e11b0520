"""Whether a ZeroMQ socket has something to read."""

from __future__ import annotations

from typing import Final, cast

import zmq

_POLLIN: Final = int(zmq.POLLIN)
"""A plain integer is cheaper than the enumeration's member."""


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """To ask is cheaper than the exception of a receive in vain, and re-arms the socket's descriptor just as
    that does, once the answer is no (libzmq's ZMQ_EVENTS documentation)."""
    return bool(cast(int, socket.get(zmq.EVENTS)) & _POLLIN)
