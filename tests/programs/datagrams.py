"""Answers each datagram with its version and what was in it, on the socket it was given as descriptor 3.

``MODE``: ok (with the SDK: at a drain it closes its copy of the socket), ends (without it: at SIGTERM, never
between a datagram and its answer), dies (at SIGTERM, wherever it is), crash (before it is ready).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from typing import Any

from target_sdk import Target

VERSION = "v1"
MODE = "ok"


class Answers(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        self._transport.sendto(b"%s %s" % (VERSION.encode(), data), peer)


async def main() -> None:
    if MODE == "crash":
        sys.exit("this build cannot start")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if MODE != "dies":
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        target = Target()
        if MODE == "ok":

            @target.on_drain
            def drain(_: float) -> None:
                transport.close()

            await stack.enter_async_context(target)
        transport, _ = await loop.create_datagram_endpoint(Answers, sock=socket.socket(fileno=3))
        if MODE == "ok":
            target.ready()
        await stop.wait()


asyncio.run(main())
