"""Draining servers with threads: the standard library's, and gunicorn."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import sys
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from load import Load  # noqa: E402
from reference_handover import Slot  # noqa: E402

from target_sdk.protocol import Result  # noqa: E402
from target_sdk.threaded import DrainingHandler, DrainingServer  # noqa: E402

WAIT_SECONDS = 60.0
REPLACEMENTS = 2


class Work:
    """``/slow`` waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()

    def do(self, path: str) -> None:
        if path == "/slow":
            self.begun.set()
            assert self.go.wait(WAIT_SECONDS)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as one:
        yield one


class Server(DrainingServer, http.server.HTTPServer):
    pass


class WsgiServer(DrainingServer, wsgiref.simple_server.WSGIServer):
    pass


@contextlib.contextmanager
def serving(server: DrainingServer, work: Work) -> Iterator[DrainingServer]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        work.go.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(listening: socket.socket, work: Work) -> Iterator[DrainingServer]:
    class Handler(DrainingHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802
            work.do(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with serving(Server.on(listening.dup(), Handler), work) as running:
        yield running


@contextlib.contextmanager
def client(listening: socket.socket) -> Iterator[http.client.HTTPConnection]:
    host, port = listening.getsockname()
    connection = http.client.HTTPConnection(host, port, timeout=WAIT_SECONDS)
    connection.connect()
    try:
        yield connection
    finally:
        connection.close()


def get(connection: http.client.HTTPConnection, path: str = "/", **more: Any) -> str | None:
    """The answer's Connection header."""
    connection.request("GET", path, **more)
    return answer(connection)


def answer(connection: http.client.HTTPConnection) -> str | None:
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"ok")
    return response.getheader("Connection")


def in_a_thread(call: Callable[[], object]) -> Callable[[], None]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def ended() -> None:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
        if errors:
            raise errors[0]

    return ended


def test_an_idle_connection_hears_of_the_end_with_its_next_answer(
    server: DrainingServer, listening: socket.socket
) -> None:
    server.idle_grace = WAIT_SECONDS
    with client(listening) as connection:
        assert get(connection) is None
        drained = in_a_thread(lambda: server.drain(WAIT_SECONDS))
        wait_for(lambda: server.draining, "the drain")
        assert get(connection) == "close"
        drained()


def test_who_never_comes_back_costs_the_grace_and_is_let_go(
    server: DrainingServer, listening: socket.socket
) -> None:
    server.idle_grace = 0.1
    with client(listening) as connection:
        get(connection)
        server.drain(WAIT_SECONDS)
        assert connection.sock.recv(100) == b""


def test_what_is_in_flight_is_finished_first(
    server: DrainingServer, listening: socket.socket, work: Work
) -> None:
    server.idle_grace = 0.0
    with client(listening) as connection:
        connection.request("GET", "/slow")
        assert work.begun.wait(WAIT_SECONDS)
        with pytest.raises(TimeoutError, match=r"1 connections are still busy after 0\.05 s"):
            server.drain(0.05)
        drained = in_a_thread(lambda: server.drain(WAIT_SECONDS))
        work.go.set()
        assert answer(connection) == "close"
        drained()


def test_nothing_more_is_accepted_and_the_successor_gets_it(
    server: DrainingServer, listening: socket.socket
) -> None:
    server.drain(WAIT_SECONDS)
    with client(listening) as connection:
        listening.settimeout(WAIT_SECONDS)
        accepted, _ = listening.accept()
        assert accepted.getpeername() == connection.sock.getsockname()
        accepted.close()


def test_an_interim_answer_is_not_the_last_one(server: DrainingServer, listening: socket.socket) -> None:
    server.idle_grace = WAIT_SECONDS
    with client(listening) as connection:
        get(connection)
        drained = in_a_thread(lambda: server.drain(WAIT_SECONDS))
        wait_for(lambda: server.draining, "the drain")
        connection.sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n")
        with connection.sock.makefile("rb") as lines:
            assert lines.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert lines.readline() == b"\r\n"
            rest = lines.read()
        assert rest.startswith(b"HTTP/1.1 200 OK") and b"Connection: close" in rest
        drained()


def test_wsgiref(listening: socket.socket, work: Work) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        work.do(environ["PATH_INFO"])
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    class Handler(wsgiref.simple_server.WSGIRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    wsgi = WsgiServer.on(listening.dup(), Handler)
    wsgi.set_app(app)
    with serving(wsgi, work), client(listening) as slow:
        with client(listening) as connection:
            get(connection)
        slow.request("GET", "/slow")
        assert work.begun.wait(WAIT_SECONDS)
        drained = in_a_thread(lambda: wsgi.drain(WAIT_SECONDS))
        wait_for(lambda: wsgi.draining, "the drain")
        work.go.set()
        answer(slow)
        drained()


# --- replaced under load ------------------------------------------------------------------------------------

WSGI = """
import time
def app(environ, start_response):
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.5)
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""

GUNICORN = [sys.executable, "-m", "gunicorn", "-c", str(REPOSITORY / "examples/gunicorn.conf.py"), "wsgi:app"]
COMMANDS = {
    "threaded_service": [sys.executable, str(REPOSITORY / "examples/threaded_service.py")],
    "gthread": [*GUNICORN, "--worker-class", "gthread", "--threads", "16"],
    "sync": [*GUNICORN, "--workers", "3"],
}


@pytest.mark.parametrize("service", COMMANDS)
def test_a_service_is_replaced_under_load_without_a_failure(service: str, tmp_path: Path) -> None:
    (tmp_path / "wsgi.py").write_text(WSGI)
    with Slot(COMMANDS[service], environment={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}) as slot:
        place = f"http://127.0.0.1:{slot.port}"
        with (
            Load(f"{place}/", rate=20, timeout=60) as new,
            Load(f"{place}/", mode="keep-alive", rate=20, connections=4, timeout=60) as kept,
            Load(
                f"{place}/slow", rate=2, timeout=60
            ) as slow,  # workers of `sync` answer one request at a time
        ):
            loads = {"new": new, "keep-alive": kept, "slow": slow}
            for _ in range(REPLACEMENTS):
                enough = len(new.results.samples) + 20
                answer = slot.replace()
                assert isinstance(answer, Result), answer
                wait_for(lambda enough=enough: len(new.results.samples) > enough, "more requests")  # type: ignore[misc]
        for name, load in loads.items():
            assert load.results.between().failed == 0, (name, load.results.between())
