"""How a web server is drained: what is told to whom, and when it is over. For asyncio; servers' parts of it
are in `asgi.py` and `aiohttp.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, Literal

from target_sdk.connections import Connections

IDLE_GRACE: Final = 5.0

LAST_WORDS: Final = 1.0
"""Seconds before the deadline at which websockets that were left alone are said goodbye after all."""

GOODBYE_CODE: Final = 1012
"""What a websocket is closed with: the service restarts, come again (IANA's registry of close codes)."""
GOODBYE_REASON: Final = "service restart"

GOODBYE_PAUSE: Final = 0.05
GOODBYE_SPREAD: Final = 1.0
"""Seconds from one goodbye to the next, and for all of them at most: every client comes back at once, and all
of them at one time would keep the new process from answering anybody (HAProxy: ``close-spread-time``)."""

Websockets = Literal["close", "leave"]
Goodbye = Callable[[], Awaitable[object]]


class Draining:
    """What is in flight in one web server, and the end of it.

    Args:
        idle_grace: for how long (seconds) idle keep-alive connections are left open, so that their next
            request is answered, with ``Connection: close``. One that is closed while its client sends the
            next request looks like a failure to it.
        tell: called while there are connections, to tell clients by other means than answers that they should
            come back on another one; at the end of the grace with True.
        websockets: ``close``: say goodbye to them when everything else is done; ``leave``: only shortly
            before the deadline.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        idle_grace: float = IDLE_GRACE,
        websockets: Websockets = "close",
        tell: Callable[[bool], None] | None = None,
    ) -> None:
        if idle_grace < 0:
            raise ValueError(f"idle_grace must not be negative, got {idle_grace!r}")
        if websockets not in {"close", "leave"}:
            raise ValueError(f'websockets must be "close" or "leave", got {websockets!r}')
        self.connections = connections
        self.active = False
        """Every answer that begins from now on is the last one on its connection."""
        self.requests = 0
        """Requests that are being answered, those of websockets not among them."""
        self.goodbyes: dict[object, Goodbye] = {}
        """How each open websocket is closed."""
        self._idle_grace = idle_grace
        self._websockets = websockets
        self._tell = tell

    async def drain(self, seconds: float) -> None:
        """Take no more, finish what there is; when this returns the server can be stopped.

        Raises:
            TimeoutError: requests or websockets are left when the time (seconds) is over.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        wait_until = self.connections.wait_until
        self.active = True
        self.connections.stop_accepting()
        await self.connections.settle()
        if not await wait_until(self._only_websockets, min(loop.time() + self._idle_grace, deadline)):
            self._tell_clients(every=True)
        # Whoever has not come back by then gets the server's own goodbye.
        await wait_until(lambda: self.requests == 0, deadline)
        if self._websockets == "leave":
            await wait_until(lambda: not self.goodbyes, deadline - LAST_WORDS)
        await self._say_goodbye(deadline)
        if self.requests or self.goodbyes:
            raise TimeoutError(
                f"{self.requests} requests and {len(self.goodbyes)} websockets are left after {seconds:g} s"
            )

    def _tell_clients(self, *, every: bool) -> None:
        if self._tell is not None:
            self._tell(every)

    def _only_websockets(self) -> bool:
        self._tell_clients(every=False)
        return self.requests == 0 and len(self.connections) <= len(self.goodbyes)

    async def _say_goodbye(self, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        spread = min(GOODBYE_SPREAD, (deadline - loop.time()) / 2)
        pause = min(GOODBYE_PAUSE, spread / max(1, len(self.goodbyes)))
        spoken: list[asyncio.Future[None]] = []
        for key, goodbye in list(self.goodbyes.items()):
            if key in self.goodbyes:  # its client may have left in the meantime
                spoken.append(asyncio.ensure_future(_quietly(goodbye)))
                await asyncio.sleep(pause)
        await self.connections.wait_until(
            lambda: not self.goodbyes and all(one.done() for one in spoken), deadline
        )
        for one in spoken:
            one.cancel()


async def _quietly(goodbye: Goodbye) -> None:
    with contextlib.suppress(Exception):  # the client is gone, or the program closed it in this moment
        await goodbye()
