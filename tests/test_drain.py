"""Draining web services: real servers, real connections; the old one is never the reason for a failure."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import h2.config
import h2.connection
import h2.events
import hypercorn.asyncio
import hypercorn.config
import pytest
import uvicorn
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType, web

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))
sys.path.insert(0, str(REPOSITORY / "examples"))

from load import Load  # noqa: E402
from reference_handover import Slot  # noqa: E402

import target_sdk.aiohttp  # noqa: E402
import target_sdk.asgi  # noqa: E402
from target_sdk import Target  # noqa: E402
from target_sdk.connections import Connections  # noqa: E402
from target_sdk.draining import GOODBYE_PAUSE, Draining, Websockets  # noqa: E402
from target_sdk.http2 import FORGET_ABOVE, GOAWAY, Goaways  # noqa: E402
from target_sdk.protocol import Result  # noqa: E402

WAIT_SECONDS = 60.0
REPLACEMENTS = 2

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return ("asyncio", {"use_uvloop": request.param == "uvloop"})


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        one.setblocking(False)
        yield one


async def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        await asyncio.sleep(0.005)


class Client:
    """One HTTP/1.1 connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, listening: socket.socket) -> Client:
        return cls(*await asyncio.open_connection(*listening.getsockname()))

    def ask(self, path: str = "/") -> None:
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    async def answer(self) -> str:
        """The head of the answer, in small letters."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        await self.reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        return head

    async def get(self, path: str = "/") -> str:
        self.ask(path)
        return await self.answer()

    def close(self) -> None:
        self.writer.close()


# --- connections --------------------------------------------------------------------------------------------


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def test_connections_are_counted_and_no_more_accepted(listening: socket.socket) -> None:
    connections = Connections()
    started: list[bool] = []
    connections.watch(started=lambda: started.append(True))
    server = await asyncio.start_server(echo, sock=listening.dup())
    assert started == [True]
    serving = asyncio.create_task(server.serve_forever())
    client = await Client.connect(listening)
    await until(lambda: len(connections) == 1, "it is counted")
    connections.stop_accepting()
    # It gets through to the queue, which is the successor's as well.
    other = await Client.connect(listening)
    client.writer.write(b"still served")
    assert await client.reader.read(100) == b"still served"
    accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
    assert accepted.getpeername() == other.writer.get_extra_info("sockname")
    accepted.close()
    if type(asyncio.get_running_loop()).__module__.startswith("asyncio"):
        assert not serving.done()
    client.close()
    await until(lambda: len(connections) == 0, "it is gone")
    serving.cancel()
    server.close()
    other.close()


async def test_a_drain_waits_for_the_last_connection(listening: socket.socket) -> None:
    connections = Connections()
    connections.watch()
    server = await asyncio.start_server(echo, sock=listening.dup())
    client = await Client.connect(listening)
    await until(lambda: len(connections) == 1, "it is counted")
    with pytest.raises(TimeoutError, match="1 connections are still open"):
        await connections.drain(0.05)
    draining = asyncio.create_task(connections.drain(WAIT_SECONDS))
    client.close()
    await draining
    server.close()


async def test_what_was_accepted_in_this_moment_is_counted(listening: socket.socket) -> None:
    connections = Connections()
    connections.watch()
    server = await asyncio.start_server(echo, sock=listening.dup())
    with socket.create_connection(listening.getsockname()):
        draining = asyncio.create_task(connections.drain(0.2))
        with pytest.raises(TimeoutError), contextlib.suppress(AssertionError):
            # Either it was accepted, and then waited for; or it is still in the queue.
            await draining
            accepted, _ = listening.accept()
            accepted.close()
            raise TimeoutError
    server.close()


async def test_a_server_that_starts_while_drained_accepts_nothing(listening: socket.socket) -> None:
    connections = Connections()
    connections.watch()
    await connections.drain(1.0)
    server = await asyncio.start_server(echo, sock=listening.dup())
    client = await Client.connect(listening)
    accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
    accepted.close()
    client.close()
    server.close()


async def test_a_connection_that_changes_its_protocol_is_counted_to_its_end(listening: socket.socket) -> None:
    connections = Connections()

    class Upgrading(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            cast(asyncio.Transport, transport).set_protocol(asyncio.Protocol())

    loop = asyncio.get_running_loop()
    server = await loop.create_server(connections.counted(Upgrading), sock=listening.dup())
    connections.add(server)
    clients = [await Client.connect(listening) for _ in range(3)]
    await until(lambda: len(connections) == 3, "all are counted")
    for client in clients:
        client.close()
    await connections.drain(WAIT_SECONDS)
    server.close()


# --- ASGI and aiohttp ---------------------------------------------------------------------------------------


class Service:
    """An application in one of the servers, on the loop of the test."""

    def __init__(self, draining: Draining, stop: Callable[[], object], task: asyncio.Task[Any]) -> None:
        self.draining = draining
        self.stop = stop
        self.task = task

    def drain(self, seconds: float = WAIT_SECONDS) -> asyncio.Task[None]:
        return asyncio.create_task(self.draining.drain(seconds))


class Work:
    """What the requests of a test do: ``/slow`` waits until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.begun = 0

    async def slow(self) -> None:
        self.begun += 1
        await self.go.wait()

    async def asgi(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            while (message := await receive())["type"] == "websocket.receive":
                await send({"type": "websocket.send", "text": message["text"]})
            return
        assert scope["type"] == "http"
        if scope["path"] == "/slow":
            await self.slow()
        headers = [(b"content-length", b"2"), (b"Connection", b"keep-alive")][
            : 1 + (scope["path"] == "/keep")
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def aiohttp(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/ws":
            websocket = web.WebSocketResponse()
            await websocket.prepare(request)
            async for message in websocket:
                if message.type is WSMsgType.TEXT:
                    await websocket.send_str(message.data)
            return websocket
        if request.path == "/slow":
            await self.slow()
        return web.Response(text="ok")


@contextlib.asynccontextmanager
async def uvicorn_service(
    http: str, work: Work, listening: socket.socket, **options: Any
) -> AsyncIterator[Service]:
    app = target_sdk.asgi.Drain(work.asgi, Target(), **options)
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="error", timeout_keep_alive=60))
    task = asyncio.create_task(server.serve(sockets=[listening.dup()]))
    await until(lambda: server.started, "it serves")
    yield Service(app.draining, lambda: setattr(server, "should_exit", True), task)
    work.go.set()
    server.should_exit = True
    await asyncio.wait_for(task, WAIT_SECONDS)


@contextlib.asynccontextmanager
async def hypercorn_service(work: Work, listening: socket.socket, **options: Any) -> AsyncIterator[Service]:
    app = target_sdk.asgi.Drain(work.asgi, Target(), **options)
    config = hypercorn.config.Config()
    with listening.dup() as copy:
        config.bind = [f"fd://{copy.detach()}"]
    config.graceful_timeout = 1.0
    config.keep_alive_timeout = 10.0
    stop = asyncio.Event()

    async def stopped() -> None:
        await stop.wait()

    serving = hypercorn.asyncio.serve(app, config, shutdown_trigger=stopped)  # type: ignore[arg-type]
    task = asyncio.create_task(serving)
    await until(lambda: app.draining.connections.servers, "it serves")
    yield Service(app.draining, stop.set, task)
    work.go.set()
    stop.set()
    await asyncio.wait_for(task, WAIT_SECONDS)


@contextlib.asynccontextmanager
async def aiohttp_service(work: Work, listening: socket.socket, **options: Any) -> AsyncIterator[Service]:
    app = web.Application()
    app.router.add_get("/{path:.*}", work.aiohttp)
    drain = target_sdk.aiohttp.Drain(app, Target(), **options)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.SockSite(runner, listening.dup()).start()
    forever = asyncio.create_task(asyncio.Event().wait())
    yield Service(drain.draining, lambda: None, forever)
    work.go.set()
    forever.cancel()
    await runner.cleanup()


SERVERS = ["h11", "httptools", "hypercorn", "aiohttp"]


@pytest.fixture
def work() -> Work:
    return Work()


def serve(server: str, work: Work, listening: socket.socket, **options: Any) -> Any:
    match server:
        case "hypercorn":
            return hypercorn_service(work, listening, **options)
        case "aiohttp":
            return aiohttp_service(work, listening, **options)
    return uvicorn_service(server, work, listening, **options)


@pytest.mark.parametrize("server", SERVERS)
async def test_an_idle_connection_hears_of_the_end_with_its_next_answer(
    server: str, work: Work, listening: socket.socket
) -> None:
    async with serve(server, work, listening, idle_grace=WAIT_SECONDS) as service:
        client = await Client.connect(listening)
        assert "connection: close" not in await client.get()
        draining = service.drain()
        await until(lambda: service.draining.active, "it drains")
        assert not draining.done()
        assert "connection: close" in await client.get()
        assert await client.reader.read() == b""
        await draining
        client.close()


@pytest.mark.parametrize("server", SERVERS)
async def test_what_is_in_flight_is_finished_first(server: str, work: Work, listening: socket.socket) -> None:
    async with serve(server, work, listening, idle_grace=0.0) as service:
        client = await Client.connect(listening)
        client.ask("/slow")
        await until(lambda: work.begun, "the request is there")
        with pytest.raises(TimeoutError, match=r"1 requests and 0 websockets are left after 0\.05 s"):
            await service.drain(0.05)
        draining = service.drain()
        work.go.set()
        assert "connection: close" in await client.answer()
        await draining
        client.close()


@pytest.mark.parametrize("server", SERVERS)
async def test_who_never_comes_back_costs_the_grace_and_no_more(
    server: str, work: Work, listening: socket.socket
) -> None:
    async with serve(server, work, listening, idle_grace=0.1) as service:
        client = await Client.connect(listening)
        await client.get()
        await asyncio.wait_for(service.drain(WAIT_SECONDS), WAIT_SECONDS / 2)
        # It was left open: the server closes it in its own way, when it is stopped.
        assert not client.reader.at_eof()
        client.close()


@pytest.mark.parametrize("server", SERVERS)
async def test_nothing_more_is_accepted(server: str, work: Work, listening: socket.socket) -> None:
    async with serve(server, work, listening) as service:
        await service.drain()
        client = await Client.connect(listening)
        accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
        assert accepted.getpeername() == client.writer.get_extra_info("sockname")
        accepted.close()
        client.close()


@contextlib.asynccontextmanager
async def websocket(listening: socket.socket) -> AsyncIterator[ClientWebSocketResponse[bool]]:
    host, port = listening.getsockname()
    async with ClientSession() as session, session.ws_connect(f"http://{host}:{port}/ws") as connected:
        yield connected


@pytest.mark.parametrize("server", SERVERS)
async def test_websockets_are_said_goodbye(server: str, work: Work, listening: socket.socket) -> None:
    async with serve(server, work, listening) as service, websocket(listening) as connected:
        await connected.send_str("hello")
        assert await connected.receive_str(timeout=WAIT_SECONDS) == "hello"
        draining = service.drain()
        message = await connected.receive(timeout=WAIT_SECONDS)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
        await draining


@pytest.mark.parametrize("server", SERVERS)
async def test_websockets_may_be_left_until_the_deadline(
    server: str, work: Work, listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    websockets: Websockets = "leave"
    async with serve(server, work, listening, websockets=websockets, idle_grace=0.0) as service:
        async with websocket(listening) as connected:
            patient = service.drain()
            await until(lambda: service.draining.active, "it drains")
            await connected.send_str("still there")
            assert await connected.receive_str(timeout=WAIT_SECONDS) == "still there"
            patient.cancel()
            # Again, near the deadline: half a second before its last words, for which there is a minute.
            monkeypatch.setattr("target_sdk.draining.LAST_WORDS", WAIT_SECONDS - 0.5)
            draining = service.drain()
            message = await connected.receive(timeout=WAIT_SECONDS)
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
            await draining
        assert service.draining.goodbyes == {}


async def test_goodbyes_are_spread_over_time() -> None:
    draining = Draining(Connections())
    said: list[float] = []

    def websocket(number: int) -> None:
        async def goodbye() -> None:
            said.append(time.monotonic())
            del draining.goodbyes[number]
            draining.goodbyes.pop(3, None)  # its client left by itself

        draining.goodbyes[number] = goodbye

    for number in range(5):
        websocket(number)
    began = time.monotonic()
    await draining.drain(WAIT_SECONDS)
    assert len(said) == 4
    # The loop's clock and this one may differ by a tick.
    assert all(at - began > number * GOODBYE_PAUSE * 0.9 for number, at in enumerate(said))


async def test_a_thousand_goodbyes_are_said_in_time() -> None:
    draining = Draining(Connections())
    for number in range(1000):

        async def goodbye(number: int = number) -> None:
            del draining.goodbyes[number]

        draining.goodbyes[number] = goodbye
    await draining.drain(1000 * GOODBYE_PAUSE / 2)
    assert draining.goodbyes == {}


async def test_clients_of_http_2_are_told_to_come_back_on_another_connection(
    work: Work, listening: socket.socket
) -> None:
    async with hypercorn_service(work, listening, idle_grace=WAIT_SECONDS) as service:
        client = await Client.connect(listening)
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        seen: list[h2.events.Event] = []

        def ask(stream: int, path: str) -> None:
            headers = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", "x")]
            connection.send_headers(stream, headers, end_stream=True)
            client.writer.write(connection.data_to_send())

        async def read_until(kind: type[h2.events.Event]) -> Any:
            while not any(isinstance(event, kind) for event in seen):
                data = await asyncio.wait_for(client.reader.read(65_536), WAIT_SECONDS)
                assert data, seen
                seen.extend(connection.receive_data(data))
                client.writer.write(connection.data_to_send())
            return next(event for event in seen if isinstance(event, kind))

        ask(1, "/slow")
        await until(lambda: work.begun, "the request is there")
        draining = service.drain()
        await until(lambda: service.draining.active, "it drains")
        work.go.set()
        answer = await read_until(h2.events.ResponseReceived)
        assert "connection" not in dict(answer.headers)
        await read_until(h2.events.StreamEnded)
        await read_until(h2.events.ConnectionTerminated)
        (terminated,) = [one for one in seen if isinstance(one, h2.events.ConnectionTerminated)]
        assert (terminated.error_code, terminated.last_stream_id) == (0, (1 << 31) - 1)
        assert not draining.done()
        client.close()
        await draining


async def test_a_message_that_has_arrived_is_answered_before_the_goodbye(
    work: Work, listening: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        await work.slow()
        await send({"type": "websocket.send", "text": "answer"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        await send({"type": "websocket.send", "text": "to nobody"})

    drain = target_sdk.asgi.Drain(app, Target(), idle_grace=0.0)
    server = uvicorn.Server(uvicorn.Config(drain, log_level="error"))
    task = asyncio.create_task(server.serve(sockets=[listening.dup()]))
    await until(lambda: server.started, "it serves")
    async with websocket(listening) as connected:
        await connected.send_str("question")
        await until(lambda: work.begun, "it is being answered")
        draining = asyncio.create_task(drain.draining.drain(WAIT_SECONDS))
        await until(lambda: drain.draining.active, "it drains")
        work.go.set()
        assert await connected.receive_str(timeout=WAIT_SECONDS) == "answer"
        message = await connected.receive(timeout=WAIT_SECONDS)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)
    await draining
    server.should_exit = True
    await task
    assert "Exception in ASGI application" not in caplog.text


class Wire(asyncio.Transport):
    """A transport that only remembers."""

    def __init__(self, port: int) -> None:
        super().__init__({"peername": ("::1", port, 0, 0)})
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed


def test_a_goaway_goes_to_connections_of_http_2_alone_and_once() -> None:
    quiet, busy, plain = Wire(1), Wire(2), Wire(3)
    goaways = Goaways(lambda: [quiet, busy, plain])
    goaways.end(goaways.begin(("::1", 1)), 10.0)
    goaways.begin(("::1", 2))
    assert goaways.begin(("::1", 9)) is None
    goaways.tell(10.05, every=False)
    assert quiet.written == b""
    goaways.tell(10.2, every=False)
    goaways.tell(10.3, every=False)
    assert (quiet.written, busy.written) == (GOAWAY, b"")
    goaways.tell(10.4, every=True)
    assert (quiet.written, busy.written, plain.written) == (GOAWAY, GOAWAY, b"")


def test_an_address_that_another_connection_has_later_gets_no_goaway() -> None:
    first, later = Wire(1), Wire(1)
    there: list[asyncio.BaseTransport] = [first]
    goaways = Goaways(lambda: there)
    goaways.end(goaways.begin(("::1", 1)), 10.0)
    first.closed = True
    there[:] = [later]
    goaways.tell(20.0, every=True)
    assert (first.written, later.written) == (b"", b"")
    goaways.end(goaways.begin(("::1", 1)), 20.0)
    goaways.tell(30.0, every=False)
    assert later.written == GOAWAY


def test_connections_that_are_gone_are_forgotten() -> None:
    there: list[asyncio.BaseTransport] = []
    goaways = Goaways(lambda: there)
    for port in range(2000):
        wire = Wire(port)
        there[:] = [wire]
        goaways.end(goaways.begin(("::1", port)), 1.0)
        wire.closed = True
    assert len(goaways._connections) <= FORGET_ABOVE


async def test_an_application_that_replaces_the_header_does_not_keep_the_connection(
    work: Work, listening: socket.socket
) -> None:
    async with uvicorn_service("h11", work, listening) as service:
        client = await Client.connect(listening)
        assert "connection: keep-alive" in await client.get("/keep")
        draining = service.drain()
        await until(lambda: service.draining.active, "it drains")
        head = await client.get("/keep")
        assert head.count("connection:") == 1 and "connection: close" in head
        await draining
        client.close()


async def test_a_lifespan_of_the_application_is_its_own(listening: socket.socket) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            seen.append(message["type"])
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    server = uvicorn.Server(uvicorn.Config(target_sdk.asgi.Drain(app, Target()), log_level="error"))
    task = asyncio.create_task(server.serve(sockets=[listening.dup()]))
    await until(lambda: server.started, "it serves")
    server.should_exit = True
    await task
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


async def test_a_start_that_fails_is_not_mistaken_for_no_lifespan(listening: socket.socket) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise RuntimeError("no database")

    config = uvicorn.Config(target_sdk.asgi.Drain(app, Target()), log_level="critical", lifespan="on")
    with listening.dup() as copy, pytest.raises(SystemExit):
        await uvicorn.Server(config).serve(sockets=[copy])


async def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="idle_grace must not be negative"):
        Draining(Connections(), idle_grace=-1.0)
    with pytest.raises(ValueError, match='websockets must be "close" or "leave"'):
        Draining(Connections(), websockets="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='ready must be "listening" or "startup"'):
        target_sdk.asgi.Drain(Work().asgi, Target(), ready="now")  # type: ignore[arg-type]


# --- replaced under load ------------------------------------------------------------------------------------

EXAMPLES = REPOSITORY / "examples"
COMMANDS = {
    "asgi_service": [sys.executable, str(EXAMPLES / "asgi_service.py")],
    "uvicorn": [
        sys.executable, "-m", "uvicorn", "asgi_service:app", "--app-dir", str(EXAMPLES), "--fd", "3",
        "--log-level", "warning", "--loop", "uvloop", "--http", "httptools",
    ],
    "hypercorn": [
        sys.executable, "-m", "hypercorn", "--workers", "0", "--bind", "fd://3",
        f"{EXAMPLES}/asgi_service:app",
    ],
    "aiohttp_service": [sys.executable, str(EXAMPLES / "aiohttp_service.py")],
}  # fmt: skip


@pytest.mark.parametrize("service", COMMANDS)
def test_a_service_is_replaced_under_load_without_a_failure(service: str) -> None:
    with Slot(COMMANDS[service]) as slot:
        place = f"127.0.0.1:{slot.port}"
        with (
            Load(f"http://{place}/", rate=20, timeout=60) as new,
            Load(f"http://{place}/", mode="keep-alive", rate=20, connections=5, timeout=60) as kept,
            Load(f"http://{place}/slow", rate=10, timeout=60) as slow,
            Load(f"ws://{place}/echo", mode="websocket", rate=20, connections=5, timeout=60) as websockets,
        ):
            loads = {"new": new, "keep-alive": kept, "slow": slow, "websocket": websockets}
            for _ in range(REPLACEMENTS):
                before = {name: len(load.results.samples) for name, load in loads.items()}
                answer = slot.replace()
                assert isinstance(answer, Result), answer
                deadline = time.monotonic() + WAIT_SECONDS
                while any(len(load.results.samples) < before[name] + 10 for name, load in loads.items()):
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
        for name, load in loads.items():
            assert load.results.between().failed == 0, (name, load.results.between())
