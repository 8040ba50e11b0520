"""A small service on a managed socket: answers every line with its version and pid.

``VERSION`` and ``MODE`` stand in this file, so a cold patch brings others. Modes: ok, crash (before it is
ready), mute (never ready), regret (ready, and says a moment later that it has failed), fall (ready, and ends
when there is a file of that name in the working directory and nobody is connected), stubborn (is not drained
before its time is up), long (takes `LONG_SECONDS` before it drains or reloads, and asks for that time),
uneven (all but the first instance crash while there is a file of that name), hesitant (all but the first are
not ready while there is a file of that name), late (says that it is ready, and makes a file of that name, but
waits for connections only when there is a file ``listen``). It does not end while there is a file of the name
``linger-`` and its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

from target_sdk import Patch, Target

VERSION = "v1"
MODE = "ok"
REGRET_SECONDS = 0.2
LONG_SECONDS = 21.0
TURNS = 10
"""Of the loop, from a connection that was accepted to its coroutine."""

target = Target()


class Service:
    def __init__(self) -> None:
        self.connections: set[asyncio.StreamWriter] = set()
        self.changed = asyncio.Event()
        self.draining = False
        self.server: asyncio.Server | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            while line := await reader.readline():
                if line.startswith(b"slow"):
                    await asyncio.sleep(0.5)
                last = " bye" if self.draining else ""
                writer.write(f"{VERSION} {os.getpid()}{last}\n".encode())
                await writer.drain()
                if last:
                    break
        except ConnectionError:
            pass
        finally:
            self.connections.discard(writer)
            self.changed.set()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def drain(self) -> None:
        self.draining = True
        assert self.server is not None
        # Not `close`, which fails for connections that were accepted in this very turn of the loop.
        asyncio.get_running_loop().remove_reader(self.server.sockets[0].fileno())
        for _ in range(TURNS):
            await asyncio.sleep(0)
        while self.connections:
            self.changed.clear()
            await self.changed.wait()


async def take_long() -> None:
    if MODE == "long":
        target.extend(10 * LONG_SECONDS)
        await asyncio.sleep(LONG_SECONDS)


async def main() -> None:
    other = target.instance != "app:0" and Path(MODE).exists()
    if MODE == "crash" or (MODE == "uneven" and other):
        sys.exit("this build cannot start")
    service, stop = Service(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    @target.on_drain
    async def drain(seconds: float) -> None:
        if MODE == "stubborn":
            await asyncio.sleep(seconds * 2)
        await take_long()
        await service.drain()

    @target.on_reload
    async def reload(patch: Patch) -> None:
        await take_long()

    async with target:
        if MODE == "late":
            target.ready()
            Path("late").touch()
            while not Path("listen").exists():
                await asyncio.sleep(0.02)
        service.server = await asyncio.start_server(service.serve, sock=socket.socket(fileno=3))
        if MODE == "hesitant" and other:
            await stop.wait()
        if MODE != "mute":
            target.ready()
        target.status(f"{VERSION} serves")
        if MODE == "regret":
            await asyncio.sleep(REGRET_SECONDS)
            target.failed("this build regrets")
        if MODE == "fall":
            while not Path("fall").exists():
                await asyncio.sleep(0.02)
            await service.drain()
            sys.exit("this build falls")
        await stop.wait()
        while Path(f"linger-{target.instance}").exists():
            await asyncio.sleep(0.02)


asyncio.run(main())
