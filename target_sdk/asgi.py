"""An ASGI application as a target that loses no request when it is replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Literal

from target_sdk.connections import Connections
from target_sdk.draining import GOODBYE_CODE, GOODBYE_REASON, IDLE_GRACE, Draining, Websockets
from target_sdk.http2 import Goaways
from target_sdk.target import Target

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]


ANSWER_SECONDS: Final = 1.0
"""For how long a goodbye waits until the application waits for the client's next message."""


class WebsocketClosedError(OSError):
    """What `send` raises once the websocket was said goodbye; ASGI wants an OSError there."""


class Drain:
    """ASGI middleware: the outermost one. ``app = Drain(app, Target())`` is all there is to do.

    It enters the target when the server starts the application, says `ready` when the server listens, answers
    the supervisor's drain, and leaves the target when the server ends the application. Handlers for patches
    are registered on the target as ever, but none for drain: that is this one's.

    The server has to speak ASGI's lifespan protocol. uvicorn (asyncio and uvloop) and hypercorn (asyncio)
    stop accepting; in other servers, whose listening sockets are not made by the event loop, everything but
    that happens.

    Args:
        idle_grace: see `Draining`.
        websockets: see `Draining`.
        ready: ``listening``: say ready when the first server of the event loop listens. ``startup``: when the
            application has started, for servers that do not listen by the event loop.
    """

    def __init__(
        self,
        app: App,
        target: Target,
        *,
        idle_grace: float = IDLE_GRACE,
        websockets: Websockets = "close",
        ready: Literal["listening", "startup"] = "listening",
    ) -> None:
        if ready not in {"listening", "startup"}:
            raise ValueError(f'ready must be "listening" or "startup", got {ready!r}')
        self._app = app
        self._target = target
        self._ready_at = ready
        connections = Connections()
        self._goaways = Goaways(connections.transports)
        self.draining = Draining(
            connections, idle_grace=idle_grace, websockets=websockets, tell=self._tell_goaway
        )
        target.on_drain(self.draining.drain)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._http(scope, receive, send)
            case "websocket":
                await self._websocket(scope, receive, send)
            case "lifespan":
                await self._lifespan(scope, receive, send)
            case _:
                await self._app(scope, receive, send)

    async def _http(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if str(scope.get("http_version", "1.1")).startswith("1"):
            await self._http_1(scope, receive, send)
            return
        client = scope.get("client")
        if client is None:
            await self._count(scope, receive, send)
            return
        connection = self._goaways.begin((client[0], client[1]))
        try:
            await self._count(scope, receive, send)
        finally:
            self._goaways.end(connection, asyncio.get_running_loop().time())

    def _tell_goaway(self, every: bool) -> None:
        self._goaways.tell(asyncio.get_running_loop().time(), every=every)

    async def _http_1(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and self.draining.active:
                kept = [pair for pair in message.get("headers", ()) if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*kept, (b"connection", b"close")]}
            await send(message)

        await self._count(scope, receive, answer)

    async def _count(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.draining.requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.draining.requests -= 1

    async def _websocket(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        draining = self.draining
        key = object()
        listening = asyncio.Event()
        shaking_hands = True
        closed = False

        def settled() -> None:
            nonlocal shaking_hands
            if shaking_hands:
                shaking_hands = False
                draining.requests -= 1

        async def receive_too() -> Message:
            listening.set()
            try:
                return await receive()
            finally:
                listening.clear()

        async def goodbye() -> None:
            nonlocal closed
            # An application that has a message in its hands may answer it first.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await listening.wait()
            if not closed:
                closed = True
                await send({"type": "websocket.close", "code": GOODBYE_CODE, "reason": GOODBYE_REASON})

        async def answer(message: Message) -> None:
            nonlocal closed
            if closed:
                raise WebsocketClosedError("the websocket was closed: the service restarts")
            if message["type"] == "websocket.close":
                closed = True
            await send(message)
            if message["type"] == "websocket.accept":
                draining.goodbyes[key] = goodbye
                settled()

        draining.requests += 1
        try:
            await self._app(scope, receive_too, answer)
        except WebsocketClosedError:
            pass  # the application did not catch it, and need not
        finally:
            draining.goodbyes.pop(key, None)
            settled()

    async def _lifespan(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        received = False
        self.draining.connections.watch(started=self._listening)

        async def receive_too() -> Message:
            nonlocal received
            received = True
            return await receive()

        async with contextlib.AsyncExitStack() as managed:
            await managed.enter_async_context(self._target)
            tell = self._telling(send, managed)
            try:
                await self._app(scope, receive_too, tell)
            except Exception:
                if received:
                    raise
                # An application without a lifespan refuses the scope at once; the target needs one.
                await self._lifespan_of_ours(receive, tell)

    async def _lifespan_of_ours(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    def _telling(self, send: Send, managed: contextlib.AsyncExitStack) -> Send:
        async def tell(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                # Some servers (hypercorn) cancel the lifespan as soon as they have heard that.
                await managed.aclose()
            await send(message)
            if message["type"] == "lifespan.startup.complete" and self._ready_at == "startup":
                self._target.ready()

        return tell

    def _listening(self) -> None:
        if self._ready_at == "listening":
            # Servers with several sockets make the others in the same turn.
            asyncio.get_running_loop().call_soon(self._target.ready)
