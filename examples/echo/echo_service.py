"""A TCP service that keeps its open connections when it is replaced: each client's lines, numbered.

    python echo_service.py [PORT]           by hand; then: nc 127.0.0.1 PORT
    python echo_service.py                  asyncsup: sockets = ["echo"]

The number belongs to the connection. In a cold patch the next build takes over the connections, their numbers
and the lines that are not complete yet; clients notice nothing.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from typing import cast

from target_sdk import HandoverError, Successor, Target, sockets

FLUSH_SECONDS = 2.0

target = Target()


class Client(asyncio.Protocol):
    """One connection, and all that there is to know about it: ``number`` and ``rest``."""

    def __init__(self, service: Service, number: int = 0, rest: bytes = b"") -> None:
        self.service = service
        self.number = number
        self.rest = rest
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.service.clients.add(self)
        self.service.deserted.clear()

    def connection_lost(self, exc: Exception | None) -> None:
        self.service.clients.discard(self)
        if not self.service.clients:
            self.service.deserted.set()

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.number += 1
            self.transport.write(b"%d %s\n" % (self.number, line))

    @property
    def flushed(self) -> bool:
        return self.transport.get_write_buffer_size() == 0


class Service:
    """The listening socket and the clients."""

    def __init__(self, listening: socket.socket) -> None:
        self.clients: set[Client] = set()
        self.deserted = asyncio.Event()
        self.deserted.set()
        self._listening = listening
        self._arriving: set[asyncio.Task[object]] = set()
        listening.setblocking(False)

    def accept(self) -> None:
        asyncio.get_running_loop().add_reader(self._listening, self._accept_one)

    async def stop_accepting(self) -> None:
        """The socket stays open: whoever connects from now on waits in its queue for our successor."""
        asyncio.get_running_loop().remove_reader(self._listening)
        if self._arriving:
            await asyncio.wait(self._arriving)

    async def adopt(self, connection: socket.socket, number: int = 0, rest: bytes = b"") -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: Client(self, number, rest), connection)

    def _accept_one(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return  # another process was faster
        task = asyncio.ensure_future(self.adopt(connection))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)


async def give(service: Service, successor: Successor) -> None:
    """Everything stands still from here to the end, or to where it goes on as if nothing had been."""
    await service.stop_accepting()
    clients = list(service.clients)
    for client in clients:
        client.transport.pause_reading()
    try:
        await until_flushed(clients)
        # Who does not read its answers stays, and has until the end of the drain.
        ready = [client for client in clients if client.flushed and not client.transport.is_closing()]
        state = [(client.number, client.rest.decode("latin-1")) for client in ready]
        connections = [client.transport.get_extra_info("socket") for client in ready]
        await successor.give_async(connections, json.dumps(state).encode())
    except HandoverError:
        service.accept()
        ready = []
    for client in ready:
        client.transport.abort()  # closes our copy; the connection is the successor's
    for client in set(clients) - set(ready):
        client.transport.resume_reading()


async def until_flushed(clients: list[Client]) -> None:
    deadline = asyncio.get_running_loop().time() + FLUSH_SECONDS
    while not all(client.flushed for client in clients):
        if asyncio.get_running_loop().time() > deadline:
            return
        await asyncio.sleep(0.01)


async def drain(service: Service, seconds: float) -> None:
    """What was not handed over: wait until those clients have gone by themselves."""
    await service.stop_accepting()
    async with asyncio.timeout(seconds):
        await service.deserted.wait()


async def main(listening: socket.socket) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    service = Service(listening)
    target.on_handover(lambda successor: give(service, successor))
    target.on_drain(lambda seconds: drain(service, seconds))
    async with target:
        service.accept()
        async with target.take_over() as state:  # says ready; the predecessor is asked to drain then
            clients = json.loads(state.data) if state else []
            descriptors = state.descriptors if state else ()
        for descriptor, (number, rest) in zip(descriptors, clients, strict=True):
            await service.adopt(socket.socket(fileno=descriptor), number, rest.encode("latin-1"))
        target.ready()
        print(f"serving on port {listening.getsockname()[1]}, {len(clients)} clients taken over", flush=True)
        await stop.wait()


if __name__ == "__main__":
    given = sockets()
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    asyncio.run(main(given["echo"] if "echo" in given else socket.create_server(("127.0.0.1", port))))
