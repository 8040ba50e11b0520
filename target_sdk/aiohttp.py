"""An aiohttp application as a target that loses no request when it is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar, cast

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from target_sdk.connections import Connections
from target_sdk.draining import GOODBYE_CODE, GOODBYE_REASON, IDLE_GRACE, Draining, Websockets
from target_sdk.target import Target

ProtocolT = TypeVar("ProtocolT", bound=asyncio.BaseProtocol)


class Drain:
    """``Drain(app, Target())`` before the application is started, by `web.run_app` or a runner of your own.

    It enters the target at the application's start, says `ready` when its site listens, answers the
    supervisor's drain, and leaves the target at the application's clean-up. Handlers for patches are
    registered on the target as ever, but none for drain: that is this one's.

    Args:
        idle_grace: see `Draining`.
        websockets: see `Draining`.
    """

    def __init__(
        self,
        app: web.Application,
        target: Target,
        *,
        idle_grace: float = IDLE_GRACE,
        websockets: Websockets = "close",
    ) -> None:
        self._target = target
        self.draining = Draining(_ServerConnections(), idle_grace=idle_grace, websockets=websockets)
        target.on_drain(self.draining.drain)
        app.middlewares.insert(0, self._counting())
        app.on_response_prepare.append(self._prepare)
        app.cleanup_ctx.insert(0, self._lifetime)

    async def _lifetime(self, app: web.Application) -> AsyncIterator[None]:
        def listening() -> None:
            asyncio.get_running_loop().call_soon(self._target.ready)

        self.draining.connections.watch(started=listening)
        async with self._target:
            yield

    def _counting(self) -> Middleware:
        draining = self.draining

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            draining.requests += 1
            try:
                return await handler(request)
            finally:
                if draining.goodbyes.pop(id(request), None) is None:
                    draining.requests -= 1

        return count

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        if isinstance(response, web.WebSocketResponse):
            self.draining.requests -= 1

            async def goodbye() -> None:
                await response.close(code=GOODBYE_CODE, message=GOODBYE_REASON.encode())

            self.draining.goodbyes[id(request)] = goodbye
        elif self.draining.active:
            response.force_close()
            response.headers["Connection"] = "close"  # aiohttp has looked already at what it is going to do


class _ServerConnections(Connections):
    """aiohttp's server counts its connections itself; its protocols have no room for more attributes."""

    def __init__(self) -> None:
        super().__init__()
        self._counting: list[web.Server] = []

    def counted(self, factory: Callable[[], ProtocolT]) -> Callable[[], ProtocolT]:
        if not isinstance(factory, web.Server):
            return super().counted(factory)
        self._counting.append(factory)
        return cast(Callable[[], ProtocolT], factory)

    def __len__(self) -> int:
        return super().__len__() + sum(len(server.connections) for server in self._counting)
