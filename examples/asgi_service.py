"""An ASGI service, under uvicorn, that is replaced by its next build without losing a request.

    python asgi_service.py [PORT]                    by hand
    python asgi_service.py                           asyncsup: sockets = ["web"]
    uvicorn asgi_service:app --fd '$(socket.web)'    the same, with uvicorn's own command line

    GET /        an answer        GET /slow    one that takes half a second        /echo    a websocket

All of it is `Drain` around the application.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import uvicorn

import target_sdk
from target_sdk.asgi import Drain

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

target = target_sdk.Target()


async def service(scope: Message, receive: Receive, send: Send) -> None:
    match scope["type"], scope.get("path"):
        case "http", "/":
            await answer(send, 200, {"build": target.build, "pid": os.getpid()})
        case "http", "/slow":
            await asyncio.sleep(0.5)
            await answer(send, 200, {"slept": 0.5})
        case "http", _:
            await answer(send, 404, {"error": "GET /, GET /slow, or a websocket to /echo"})
        case "websocket", "/echo":
            await echo(receive, send)
        case "websocket", _:
            await send({"type": "websocket.close"})
        case kind, _:
            raise NotImplementedError(kind)  # lifespan: `Drain` has one


async def answer(send: Send, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(receive: Receive, send: Send) -> None:
    await receive()  # websocket.connect
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message.get("text") or ""})


app = Drain(service, target)


def main() -> None:
    given = target_sdk.sockets()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    server.run(sockets=list(given.all("web")) if "web" in given else None)


if __name__ == "__main__":
    main()
