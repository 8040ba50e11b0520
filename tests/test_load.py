"""The load generator: a service that misbehaves in one way is reported as exactly that."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import free_port, wait_for

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from load import Load, Mode, Outcome, Results, Sample, Summary  # noqa: E402

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Behaviour = Callable[[socket.socket, int], None]
"""Serves one connection, whose number it is given; it is closed afterwards."""


class Service:
    """A server of raw connections, one thread each."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
        self.port = self._listening.getsockname()[1]
        self.accepted = 0
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            thread = threading.Thread(target=self._serve, args=(connection, self.accepted))
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError):
            self._behaviour(connection, number)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in (self._acceptor, *self._threads):
            thread.join(20)
            assert not thread.is_alive()


@contextlib.contextmanager
def service(behaviour: Behaviour) -> Iterator[Service]:
    running = Service(behaviour)
    try:
        yield running
    finally:
        running.close()


def request(connection: socket.socket) -> bytes:
    """Read one request; nothing when the client has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(4096)
        if not more:
            return b""
        data += more
    return data


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def answering(*answers: bytes) -> Behaviour:
    def behave(connection: socket.socket, number: int) -> None:
        for answer in answers:
            if not request(connection):
                return
            connection.sendall(answer)

    return behave


def good(connection: socket.socket, number: int) -> None:
    while request(connection):
        connection.sendall(OK)


def resetting(connection: socket.socket, number: int) -> None:
    request(connection)
    reset(connection)


def closing(connection: socket.socket, number: int) -> None:
    request(connection)


def truncated_by_a_reset(connection: socket.socket, number: int) -> None:
    request(connection)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    reset(connection)


def silent(connection: socket.socket, number: int) -> None:
    while connection.recv(4096):
        pass


def stale(connection: socket.socket, number: int) -> None:
    """Answers once, then resets at the next request: the race a server loses that closes idle connections."""
    request(connection)
    connection.sendall(OK)
    if request(connection):
        reset(connection)


def run(
    url: str,
    count: int,
    *,
    mode: Mode = "new",
    connections: int = 3,
    timeout: float = 60.0,
    until: Callable[[Results], bool] = lambda results: True,
) -> Summary:
    """Load until this many requests have ended, and what is looked for was among them."""
    with Load(url, mode=mode, rate=100, connections=connections, timeout=timeout) as load:
        wait_for(
            lambda: len((found := load.results).samples) >= count and until(found),
            f"{count} requests and more",
        )
    return load.results.between()


def only(outcome: Outcome, summary: Summary) -> bool:
    return summary.outcomes == {outcome.value: summary.requests}


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        (good, Outcome.OK),
        (answering(b"HTTP/1.1 200 OK\r\n\r\nto the end"), Outcome.OK),
        (answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"), Outcome.OK),
        (resetting, Outcome.RESET),
        (closing, Outcome.CLOSED),
        (answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"), Outcome.TRUNCATED),
        (answering(b"HTTP/1.1 200 OK\r\nContent-"), Outcome.TRUNCATED),
        (answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"), Outcome.TRUNCATED),
        (truncated_by_a_reset, Outcome.TRUNCATED),
        (answering(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"), Outcome.SERVER_ERROR),
        (answering(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"), Outcome.WRONG),
        (answering(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), Outcome.WRONG),
    ],
)
def test_a_new_connection_for_each_request(behaviour: Behaviour, outcome: Outcome) -> None:
    with service(behaviour) as running:
        summary = run(f"http://127.0.0.1:{running.port}/x?y=1", 10)
        assert only(outcome, summary), summary.outcomes
        assert running.accepted == summary.requests


def test_refused() -> None:
    assert only(Outcome.REFUSED, run(f"http://127.0.0.1:{free_port()}/", 10))


def test_a_service_that_never_answers_is_a_time_out() -> None:
    with service(silent) as running:
        assert only(Outcome.TIMEOUT, run(f"http://127.0.0.1:{running.port}/", 5, timeout=0.1))


def test_connections_are_kept_and_used_one_after_the_other() -> None:
    with service(good) as running:
        url = f"http://127.0.0.1:{running.port}/"
        summary = run(url, 30, mode="keep-alive", until=lambda found: len(found.samples) > running.accepted)
        assert only(Outcome.OK, summary)
        assert 3 <= running.accepted < summary.requests


def test_one_that_is_closed_at_its_next_use_is_stale() -> None:
    with service(stale) as running:
        summary = run(
            f"http://127.0.0.1:{running.port}/",
            30,
            mode="keep-alive",
            until=lambda found: "stale" in found.between().outcomes,
        )
    assert summary.outcomes.keys() == {"ok", "stale"}
    assert summary.failed == summary.outcomes["stale"] > 0


def test_one_that_was_closed_while_it_was_idle_is_no_failure() -> None:
    turn = threading.Lock()

    def once(connection: socket.socket, number: int) -> None:
        if request(connection):
            with turn:  # one at most is answered and still open; the client comes back to one of three
                connection.sendall(OK)
                connection.close()

    with service(once) as running:
        summary = run(f"http://127.0.0.1:{running.port}/", 30, mode="keep-alive")
        assert only(Outcome.OK, summary), summary.outcomes
        assert running.accepted == summary.requests


def test_the_last_answer_of_a_connection_is_not_followed_by_another_request() -> None:
    last = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    with service(answering(last, b"never")) as running:
        assert only(Outcome.OK, run(f"http://127.0.0.1:{running.port}/", 20, mode="keep-alive"))


# --- websockets ---------------------------------------------------------------------------------------------

UPGRADE = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def message(connection: socket.socket) -> bytes:
    """The content of the client's next message; nothing when it has closed."""
    head = connection.recv(2, socket.MSG_WAITALL)
    if len(head) < 2:
        return b""
    rest = connection.recv(4 + (head[1] & 0x7F), socket.MSG_WAITALL)
    return bytes(byte ^ rest[index % 4] for index, byte in enumerate(rest[4:]))


def frame(kind: int, content: bytes) -> bytes:
    return bytes([0x80 | kind, len(content)]) + content


def echoing(times: int, then: bytes = b"", *, idle: bool = False) -> Behaviour:
    """Echoes so many messages and closes: after ``then``, at the next message or while the client is idle."""

    def behave(connection: socket.socket, number: int) -> None:
        request(connection)
        connection.sendall(UPGRADE)
        for _ in range(times):
            content = message(connection)
            if not content:
                return
            connection.sendall(frame(0x9, b"ping") + frame(0x1, content))
            message(connection)  # the pong
        if idle or message(connection):
            connection.sendall(then)

    return behave


def test_messages_come_back() -> None:
    with service(echoing(10_000)) as running:
        url = f"ws://127.0.0.1:{running.port}/"
        summary = run(url, 30, mode="websocket", until=lambda found: len(found.samples) > running.accepted)
        assert only(Outcome.OK, summary), summary.outcomes
        assert running.accepted < summary.requests
        assert summary.resent == 0


@pytest.mark.parametrize("idle", [False, True])
def test_a_polite_goodbye_is_no_failure(idle: bool) -> None:
    goodbye = frame(0x8, (1012).to_bytes(2) + b"service restart")
    with service(echoing(2, goodbye, idle=idle)) as running:
        summary = run(
            f"ws://127.0.0.1:{running.port}/",
            30,
            mode="websocket",
            until=lambda found: idle or found.between().resent > 0,
        )
    assert only(Outcome.OK, summary), summary.outcomes
    assert idle or summary.resent > 0


@pytest.mark.parametrize(
    ("then", "outcome"),
    [
        (b"", Outcome.STALE),
        (frame(0x8, (1011).to_bytes(2)), Outcome.WRONG),
        (frame(0x8, b""), Outcome.WRONG),
        (frame(0x1, b"something else"), Outcome.WRONG),
        (frame(0x1, b"half of it")[:5], Outcome.TRUNCATED),
    ],
)
def test_a_websocket_that_ends_badly(then: bytes, outcome: Outcome) -> None:
    with service(echoing(1, then)) as running:
        summary = run(
            f"ws://127.0.0.1:{running.port}/",
            30,
            mode="websocket",
            until=lambda found: outcome.value in found.between().outcomes,
        )
    assert summary.outcomes.keys() == {"ok", outcome.value}


@pytest.mark.parametrize(("status", "outcome"), [(503, Outcome.SERVER_ERROR), (200, Outcome.WRONG)])
def test_a_handshake_that_is_refused(status: int, outcome: Outcome) -> None:
    answer = f"HTTP/1.1 {status} Something\r\nContent-Length: 0\r\n\r\n".encode()
    with service(answering(answer)) as running:
        assert only(outcome, run(f"ws://127.0.0.1:{running.port}/", 10, mode="websocket"))


# --- what is made of it -------------------------------------------------------------------------------------


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A service that stands still is charged for all that was due meanwhile, not for one request."""
    stopped = threading.Event()
    go_on = threading.Event()

    def standing_still(connection: socket.socket, number: int) -> None:
        request(connection)
        if number >= 5:
            stopped.set()
            go_on.wait(60)
        connection.sendall(OK)

    with service(standing_still) as running:
        with Load(f"http://127.0.0.1:{running.port}/", rate=100, timeout=60) as load:
            assert stopped.wait(20)
            wait_for(lambda: len(load.results.samples) >= 4, "the answers before it")
            began = time.monotonic()
            wait_for(lambda: running.accepted >= 25, "requests that go on coming")
            stood = time.monotonic() - began
            go_on.set()
        results = load.results
    assert only(Outcome.OK, results.between())
    assert sum(sample.latency > stood / 2 for sample in results.samples) >= 8
    assert results.between().gap >= stood * 1000


def test_the_figures_of_a_time() -> None:
    samples = [Sample(i * 0.1, i * 0.1 + 0.01 * (i + 1), Outcome.OK) for i in range(10)]
    samples[4] = Sample(0.4, 0.45, Outcome.RESET)
    results = Results(samples)
    every = results.between()
    assert (every.requests, every.failed, every.outcomes) == (10, 1, {"ok": 9, "reset": 1})
    assert every.max == pytest.approx(100)
    assert every.p50 == pytest.approx(60)
    assert every.gap == pytest.approx(220)  # from the success at 0.34 to the one at 0.56
    part = results.between(0.4, 0.5)
    assert (part.requests, part.failed) == (1, 1)
    assert part.gap == pytest.approx(220)
    assert math.isnan(part.p99)
    assert math.isnan(results.between(5, 6).gap)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match="not a URL of http, https, ws or wss: 'ftp://x'"):
        Load("ftp://x")
    with pytest.raises(ValueError, match="rate must be positive"):
        Load("http://x", rate=0)
    with pytest.raises(ValueError, match="mode must be one of new, keep-alive, websocket"):
        Load("http://x", mode="old")  # type: ignore[arg-type]


@pytest.mark.parametrize(("behaviour", "status"), [(good, 0), (resetting, 1)])
def test_the_command_line(behaviour: Behaviour, status: int) -> None:
    with service(behaviour) as running:
        command = [
            sys.executable,
            str(REPOSITORY / "benchmarks/load.py"),
            f"http://127.0.0.1:{running.port}/",
        ]
        options = ["--seconds", "0.3", "--rate", "50"]
        done = subprocess.run([*command, *options, "--json"], stdout=subprocess.PIPE, timeout=60, check=False)
        assert done.returncode == status
        summary = json.loads(done.stdout)
        assert summary["failed"] == (summary["requests"] if status else 0)
        text = subprocess.run(
            [*command, *options], stdout=subprocess.PIPE, text=True, timeout=60, check=False
        )
        assert ("reset" in text.stdout) == bool(status)
        assert "longest time without a success" in text.stdout
