"""The connections of an asyncio program's servers: how many there are, and how to take no more.

Taking no more is not closing: the listening socket is shared with the successor, so it is only taken out of
the event loop. What waits in its queue is accepted by the successor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, TypeVar

LOOK_EVERY: Final = 0.02
"""Seconds between two looks at the connections, while somebody waits for their end and only then."""

TURNS: Final = 4
"""Turns of the event loop after which every connection that was accepted has got its protocol."""

PRUNE_ABOVE: Final = 256

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)


class Connections:
    """Counts the connections of every server that it is told of, or that is started on a loop it watches."""

    def __init__(self) -> None:
        self.stopped = False
        """Whether `stop_accepting` was called."""
        self.servers: list[asyncio.AbstractServer] = []
        self._open: set[asyncio.BaseTransport] = set()
        self._prune_above = PRUNE_ABOVE

    def watch(self, *, started: Callable[[], None] | None = None) -> None:
        """Look after every server that is started on the running loop from here on.

        A web server makes its listening servers itself and shows them to nobody, so their making is watched:
        ``create_server`` and ``create_unix_server`` of this one loop object (`asyncio.start_server` calls
        them as well). The standard library's loops and uvloop's allow it.

        Args:
            started: called whenever a server has begun to listen.
        """
        loop = asyncio.get_running_loop()
        for name in ("create_server", "create_unix_server"):
            setattr(loop, name, self._watched(getattr(loop, name), started))

    def counted(self, factory: Callable[[], ProtocolT]) -> Callable[[], ProtocolT]:
        """A protocol factory whose connections are counted; for `create_server` without `watch`."""

        def make() -> ProtocolT:
            protocol = factory()
            made, lost = protocol.connection_made, protocol.connection_lost
            transports: list[asyncio.BaseTransport] = []

            def connection_made(transport: asyncio.BaseTransport) -> None:
                transports.append(transport)
                self._add(transport)
                made(transport)

            def connection_lost(error: Exception | None) -> None:
                while transports:
                    self._open.discard(transports.pop())
                lost(error)

            # On the object and not around it: servers look at the type of their protocols and replace them.
            setattr(protocol, "connection_made", connection_made)  # noqa: B010 - a method, for mypy
            setattr(protocol, "connection_lost", connection_lost)  # noqa: B010
            return protocol

        return make

    def add(self, server: asyncio.AbstractServer) -> None:
        """Take this server out of the loop as well, when no more connections are to be accepted."""
        self.servers.append(server)
        if self.stopped:
            self.stop_accepting()

    def stop_accepting(self) -> None:
        """Accept no more connections; those that are open stay so. May be called again.

        Never ``shutdown(2)``, which would stop the successor too; and not `Server.close` where that can be
        avoided, because it ends a program that waits in `serve_forever`.
        """
        self.stopped = True
        for server in self.servers:
            loop = server.get_loop()
            if isinstance(loop, asyncio.SelectorEventLoop):
                for listening in getattr(server, "sockets", ()):
                    loop.remove_reader(listening.fileno())
            else:
                server.close()  # uvloop's reads its sockets itself; this closes our copy of them and no more

    def transports(self) -> list[asyncio.BaseTransport]:
        """Those of the connections that are open."""
        return [transport for transport in self._open if not transport.is_closing()]

    def __len__(self) -> int:
        return sum(map(_is_open, self._open))

    def __bool__(self) -> bool:
        return True

    async def settle(self) -> None:
        """Wait until whatever had been accepted before is counted."""
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def wait_until(self, condition: Callable[[], bool], deadline: float) -> bool:
        """Wait for what has no event of its own; False if it is not so by the deadline (loop time)."""
        loop = asyncio.get_running_loop()
        while not condition():
            left = deadline - loop.time()
            if left <= 0:
                return False
            # asyncio begins to accept again, by itself, a second after it ran out of descriptors.
            if self.stopped:
                self.stop_accepting()
            await asyncio.sleep(min(LOOK_EVERY, left))
        return True

    async def drain(self, seconds: float) -> None:
        """Accept no more and wait until the last connection is closed; right as an `on_drain` handler.

        Raises:
            TimeoutError: there are connections left when the time (seconds) is over.
        """
        self.stop_accepting()
        await self.settle()
        deadline = asyncio.get_running_loop().time() + seconds
        if not await self.wait_until(lambda: len(self) == 0, deadline):
            raise TimeoutError(f"{len(self)} connections are still open after {seconds:g} s")

    def _add(self, transport: asyncio.BaseTransport) -> None:
        if len(self._open) >= self._prune_above:
            # Whoever changes the protocol of a connection (websockets) is told of its end, and not we.
            self._open = set(filter(_is_open, self._open))
            self._prune_above = max(PRUNE_ABOVE, 2 * len(self._open))
        self._open.add(transport)

    def _watched(self, create: Any, started: Callable[[], None] | None) -> Any:
        async def create_server(factory: Callable[[], asyncio.BaseProtocol], *args: Any, **more: Any) -> Any:
            server = await create(self.counted(factory), *args, **more)
            self.add(server)
            if started is not None:
                started()
            return server

        return create_server


def _is_open(transport: asyncio.BaseTransport) -> bool:
    if not transport.is_closing():
        return True
    # By its methods: uvloop's transports are none of asyncio's classes.
    waiting = getattr(transport, "get_write_buffer_size", None)
    return waiting is not None and waiting() > 0
