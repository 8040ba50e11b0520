"""Telling the clients of HTTP/2 connections to come back on another one, below a server that cannot.

RFC 9113, section 6.8: a server that is going to end a connection first sends a GOAWAY that names the highest
possible stream: nothing is refused, but no more requests should be begun. ASGI has no message for it. It is
17 bytes that may stand between any two frames, and servers give whole frames to their transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, cast

GOAWAY: Final = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000")

QUIET_SECONDS: Final = 0.1
"""For how long a connection has to be without a request before its client is told. Some clients take a GOAWAY
as the end of what is under way, too."""

FORGET_ABOVE: Final = 1024

Client = tuple[str, int]
Transports = Callable[[], Iterable[asyncio.BaseTransport]]


@dataclass(slots=True)
class _Connection:
    """One that has carried a request of HTTP/2."""

    transport: asyncio.BaseTransport
    streams: int = 0
    quiet_since: float = 0.0
    told: bool = False


class Goaways:
    """Which connections speak HTTP/2, what is under way on them, and which have been told.

    ASGI names a connection by its client's address, which another one may have later: so the transport is
    looked up once for each connection, and remembered.
    """

    def __init__(self, transports: Transports) -> None:
        self._transports = transports
        self._connections: dict[Client, _Connection] = {}
        self._forget_above = FORGET_ABOVE

    def begin(self, client: Client) -> _Connection | None:
        """A request has come from this address; give the answer to `end`."""
        known = self._connections.get(client)
        if known is None or known.transport.is_closing():
            found = next((one for one in self._transports() if _peer(one) == client), None)
            if found is None:
                return None  # a proxy's word for it, or a server whose connections are not the loop's
            known = self._remember(client, _Connection(found))
        known.streams += 1
        return known

    def end(self, connection: _Connection | None, now: float) -> None:
        """That request has been answered."""
        if connection is not None:
            connection.streams -= 1
            connection.quiet_since = now

    def tell(self, now: float, *, every: bool) -> None:
        """Send what is due: to those that are quiet, or (in the end) to every one."""
        for one in self._connections.values():
            quiet = one.streams == 0 and now - one.quiet_since >= QUIET_SECONDS
            if (every or quiet) and not one.told and not one.transport.is_closing():
                one.told = True
                cast(asyncio.WriteTransport, one.transport).write(GOAWAY)

    def _remember(self, client: Client, connection: _Connection) -> _Connection:
        if len(self._connections) >= self._forget_above:
            there = {key: one for key, one in self._connections.items() if not one.transport.is_closing()}
            self._connections = there
            self._forget_above = max(FORGET_ABOVE, 2 * len(there))
        self._connections[client] = connection
        return connection


def _peer(transport: asyncio.BaseTransport) -> Client | None:
    """The client's address as ASGI has it; None where there is none (UNIX sockets)."""
    name = transport.get_extra_info("peername")
    return (name[0], name[1]) if isinstance(name, tuple) and len(name) >= 2 else None
