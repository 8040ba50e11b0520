"""A TCP service whose clients stay connected while the process behind them is replaced."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from reference_handover import Slot  # noqa: E402

from target_sdk.protocol import Failure, Notification, Result, TakeOver  # noqa: E402

CLIENTS = 1000
REPLACEMENTS = 3


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for the clients' ends, here; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * CLIENTS if hard == resource.RLIM_INFINITY else min(hard, 4 * CLIENTS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Client:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._lines = self.socket.makefile("rb")

    def ask(self, line: bytes) -> bytes:
        self.socket.sendall(line + b"\n")
        return self.answer()

    def answer(self) -> bytes:
        return self._lines.readline().rstrip(b"\n")

    def close(self) -> None:
        self._lines.close()
        self.socket.close()


@contextlib.contextmanager
def clients(port: int, count: int) -> Iterator[list[Client]]:
    connected = [Client(port) for _ in range(count)]
    try:
        yield connected
    finally:
        for client in connected:
            client.close()


@pytest.fixture
def slot() -> Iterator[Slot]:
    with Slot([sys.executable, str(REPOSITORY / "examples/echo/echo_service.py")], name="echo") as running:
        yield running


def test_a_thousand_clients_stay_connected_through_replacements(many_descriptors: None, slot: Slot) -> None:
    with clients(slot.port, CLIENTS) as connected:
        for number, client in enumerate(connected):
            assert client.ask(b"hello %d" % number) == b"1 hello %d" % number
        for count in range(2, 2 + REPLACEMENTS):
            before = slot.pid
            for number, client in enumerate(connected):
                # The one that is replaced may read the first half, or its successor all of it.
                client.socket.sendall(b"half of ")
                if number % 2:
                    client.socket.sendall(b"line %d\n" % number)
            answer = slot.replace()
            assert isinstance(answer, Result), answer
            assert slot.pid != before
            for number, client in enumerate(connected):
                if not number % 2:
                    client.socket.sendall(b"line %d\n" % number)
                assert client.answer() == b"%d half of line %d" % (count, number)


def test_who_connects_meanwhile_is_served_as_well(slot: Slot) -> None:
    with clients(slot.port, 3) as old:
        assert [client.ask(b"x") for client in old] == [b"1 x"] * 3
        slot.replace()
        with clients(slot.port, 3) as new:
            assert [client.ask(b"y") for client in new] == [b"1 y"] * 3
            slot.replace()
            assert [client.ask(b"z") for client in (*old, *new)] == [b"2 z"] * 6


def test_a_successor_that_ends_in_the_middle_costs_nothing(slot: Slot) -> None:
    hello = Notification(method=TakeOver.METHOD, params=TakeOver(pid=1).params()).encode()
    with clients(slot.port, 20) as connected:
        assert [client.ask(b"x") for client in connected] == [b"1 x"] * 20
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as successor:
            successor.settimeout(60)
            successor.connect(str(slot.handover))
            successor.send(hello)

            def end_in_the_middle() -> None:
                successor.recv(1000)
                successor.close()

            ending = threading.Thread(target=end_in_the_middle)
            ending.start()
            answer = slot.drain()
            ending.join()
        assert isinstance(answer, Failure) and answer.data == {"code": "handover.failed"}
        # All goes on where it was, new clients too; and the next successor gets everything.
        assert [client.ask(b"y") for client in connected] == [b"2 y"] * 20
        with clients(slot.port, 1) as (new,):
            assert new.ask(b"x") == b"1 x"
            assert isinstance(slot.replace(), Result)
            assert [client.ask(b"z") for client in (*connected, new)] == [b"3 z"] * 20 + [b"2 z"]


def test_without_clients_there_is_nothing_to_hand_over(slot: Slot) -> None:
    assert isinstance(slot.replace(), Result)
    with clients(slot.port, 1) as (client,):
        assert client.ask(b"x") == b"1 x"
