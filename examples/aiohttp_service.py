"""An aiohttp service that is replaced by its next build without losing a request.

    python aiohttp_service.py [PORT]        by hand
    python aiohttp_service.py               asyncsup: sockets = ["web"]

    GET /        an answer        GET /slow    one that takes half a second        /echo    a websocket

All of it is `Drain(app, target)`.
"""

from __future__ import annotations

import asyncio
import os
import sys

from aiohttp import WSMsgType, web

import target_sdk
from target_sdk.aiohttp import Drain

target = target_sdk.Target()


async def index(request: web.Request) -> web.Response:
    return web.json_response({"build": target.build, "pid": os.getpid()})


async def slow(request: web.Request) -> web.Response:
    await asyncio.sleep(0.5)
    return web.json_response({"slept": 0.5})


async def echo(request: web.Request) -> web.WebSocketResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    async for message in websocket:
        if message.type is WSMsgType.TEXT:
            await websocket.send_str(message.data)
    return websocket


def main() -> None:
    app = web.Application()
    app.add_routes([web.get("/", index), web.get("/slow", slow), web.get("/echo", echo)])
    Drain(app, target)
    given = target_sdk.sockets()
    if "web" in given:
        web.run_app(app, sock=given["web"], print=None)
    else:
        web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)


if __name__ == "__main__":
    main()
