"""The target channel against real DEALER sockets: tokens, repeats, strangers and garbage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from asyncsup.channel import PeerError, PeerGoneError, TargetChannel
from asyncsup.ipc import Router
from target_sdk.protocol import MAX_MESSAGE_BYTES, Failure, Hello, Request, Result, decode

pytestmark = pytest.mark.anyio

WAIT_SECONDS = 60.0


class Listener:
    """What an instance hears from the channel."""

    name = "web:0"

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def said_hello(self, hello: Hello) -> Mapping[str, Any]:
        self.heard.append(hello)
        return {"name": "web", "instance": "web:0", "build": 1, "region": "here"}

    def said_ready(self, build: int | None) -> None:
        self.heard.append(("ready", build))

    def said_status(self, text: str) -> None:
        self.heard.append(("status", text))

    def said_failed(self, reason: str) -> None:
        self.heard.append(("failed", reason))

    def said_extend(self, seconds: float) -> None:
        self.heard.append(("extend", seconds))

    def said_stopping(self) -> None:
        self.heard.append("stopping")


class Wire:
    """A channel, its listener, and peers that speak to it byte by byte."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/target.sock"
        self._server: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._clients = zmq.asyncio.Context()
        self.channel = TargetChannel(partial(Router, self._server, self.endpoint))
        self.channel.open()
        self._peers: list[zmq.asyncio.Socket] = []
        self.listener = Listener()
        self.channel.admit("secret", self.listener)

    def peer(self) -> zmq.asyncio.Socket:
        peer = self._clients.socket(zmq.DEALER)
        peer.linger = 0
        peer.connect(self.endpoint)
        self._peers.append(peer)
        return peer

    async def introduced(self) -> zmq.asyncio.Socket:
        peer = self.peer()
        answer = await ask(peer, "hello", hello("secret"))
        assert isinstance(answer, Result)
        return peer

    def close(self) -> None:
        self.channel.close()
        for peer in self._peers:
            peer.close()
        self._clients.destroy(0)
        self._server.destroy(0)


@pytest.fixture
async def wire(short_tmp: Path) -> AsyncIterator[Wire]:
    wire = Wire(short_tmp)
    yield wire
    wire.close()


def hello(token: str, **changes: Any) -> dict[str, Any]:
    return {**Hello(token=token, pid=1, sdk="test").params(), **changes}


async def ask(peer: zmq.asyncio.Socket, method: str, params: Mapping[str, Any], id_: int = 1) -> Any:
    await peer.send(Request(id=id_, method=method, params=params).encode())
    return decode(await asyncio.wait_for(peer.recv(), WAIT_SECONDS))


async def counted(wire: Wire, counter: str, least: int = 1) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while wire.channel.counters[counter] < least:
            await asyncio.sleep(0.005)


async def test_a_hello_with_the_right_token_is_welcomed(wire: Wire) -> None:
    answer = await ask(wire.peer(), "hello", hello("secret"))
    assert answer == Result(id=1, result={"name": "web", "instance": "web:0", "build": 1, "region": "here"})
    assert wire.listener.heard == [Hello(token="secret", pid=1, sdk="test")]


async def test_everything_an_instance_says_is_acknowledged(wire: Wire) -> None:
    peer = await wire.introduced()
    said: list[tuple[str, dict[str, Any], Any]] = [
        ("ready", {"build": 7}, ("ready", 7)),
        ("ready", {"build": None}, ("ready", None)),
        ("status", {"text": "busy"}, ("status", "busy")),
        ("failed", {"reason": "no prices"}, ("failed", "no prices")),
        ("extend", {"seconds": 3}, ("extend", 3.0)),
        ("stopping", {}, "stopping"),
    ]
    for number, (method, params, heard) in enumerate(said, 2):
        assert await ask(peer, method, params, number) == Result(id=number, result={})
        assert wire.listener.heard[-1] == heard


async def test_what_is_said_again_is_acknowledged_again_and_counts_once(wire: Wire) -> None:
    """Else a `ready` whose acknowledgement was late would take back a `failed` that came after it."""
    peer = await wire.introduced()
    ready: dict[str, Any] = {"build": 7}
    assert await ask(peer, "ready", ready, 2) == Result(id=2, result={})
    assert await ask(peer, "failed", {"reason": "no prices"}, 3) == Result(id=3, result={})
    assert await ask(peer, "ready", ready, 2) == Result(id=2, result={})
    assert wire.listener.heard[1:] == [("ready", 7), ("failed", "no prices")]
    # Another id: it means it; and so does another process in the place of this one.
    await ask(peer, "ready", ready, 4)
    assert len(wire.listener.heard) == 4
    other = await wire.introduced()
    await ask(other, "ready", ready, 4)
    assert wire.listener.heard[-1] == ("ready", 7)
    assert len(wire.listener.heard) == 6


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("ready", {"build": "7"}),
        ("ready", {"build": True}),
        ("status", {"text": 3}),
        ("status", {}),
        ("failed", {"reason": 3}),
        ("failed", {}),
        ("extend", {"seconds": "3"}),
        ("extend", {"seconds": -1}),
        ("extend", {"seconds": 1e9}),
        ("no_such_method", {}),
        ("hello", {"token": 3}),
        ("hello", hello("secret", protocol=99)),
    ],
)
async def test_a_wrong_request_gets_an_error_and_changes_nothing(
    wire: Wire, method: str, params: dict[str, Any]
) -> None:
    peer = await wire.introduced()
    before = list(wire.listener.heard)
    answer = await ask(peer, method, params, 2)
    assert isinstance(answer, Failure)
    assert answer.id == 2
    assert wire.listener.heard == before
    assert wire.channel.counters["target.bad_request"] == 1


async def test_a_foreign_token_is_refused_and_counted(wire: Wire) -> None:
    answer = await ask(wire.peer(), "hello", hello("guess"))
    assert isinstance(answer, Failure)
    assert answer.data == {"code": "channel.unknown_token"}
    assert wire.channel.counters["target.foreign_token"] == 1
    assert wire.listener.heard == []


async def test_who_has_not_said_hello_is_not_heard(wire: Wire) -> None:
    answer = await ask(wire.peer(), "ready", {"build": 1})
    assert isinstance(answer, Failure)
    assert wire.listener.heard == []
    assert wire.channel.counters["target.stranger"] == 1


async def test_a_request_waits_for_the_hello_and_is_answered(wire: Wire) -> None:
    request = asyncio.ensure_future(
        wire.channel.request("secret", "prepare", {"x": 1}, deadline=WAIT_SECONDS)
    )
    await asyncio.sleep(0)
    peer = await wire.introduced()
    asked = decode(await asyncio.wait_for(peer.recv(), WAIT_SECONDS))
    assert isinstance(asked, Request)
    assert (asked.method, asked.params) == ("prepare", {"x": 1})
    await peer.send(Result(id=asked.id, result="yes").encode())
    assert await request == "yes"


async def test_an_unanswered_request_is_repeated_with_the_same_id_also_after_a_reconnect(wire: Wire) -> None:
    peer = await wire.introduced()
    request = asyncio.ensure_future(wire.channel.request("secret", "reload", {}, deadline=WAIT_SECONDS))
    first = await asyncio.wait_for(peer.recv(), WAIT_SECONDS)
    assert await asyncio.wait_for(peer.recv(), WAIT_SECONDS) == first
    peer.close()
    again = await wire.introduced()
    assert await asyncio.wait_for(again.recv(), WAIT_SECONDS) == first
    asked = decode(first)
    assert isinstance(asked, Request)
    await again.send(Result(id=asked.id, result={}).encode())
    assert await request == {}


async def test_a_request_ends_at_its_deadline_and_a_late_answer_is_stale(wire: Wire) -> None:
    peer = await wire.introduced()
    with pytest.raises(TimeoutError):
        await wire.channel.request("secret", "prepare", {}, deadline=0.05)
    asked = decode(await asyncio.wait_for(peer.recv(), WAIT_SECONDS))
    assert isinstance(asked, Request)
    await peer.send(Result(id=asked.id, result={}).encode())
    await counted(wire, "target.stale_answer")


async def test_an_answer_from_another_instance_is_foreign(wire: Wire) -> None:
    other = Listener()
    wire.channel.admit("other", other)
    peer, stranger = await wire.introduced(), wire.peer()
    await ask(stranger, "hello", hello("other"))
    request = asyncio.ensure_future(wire.channel.request("secret", "prepare", {}, deadline=WAIT_SECONDS))
    asked = decode(await asyncio.wait_for(peer.recv(), WAIT_SECONDS))
    assert isinstance(asked, Request)
    await stranger.send(Result(id=asked.id, result={"verdict": "go_ahead"}).encode())
    await counted(wire, "target.stale_answer")
    assert not request.done()
    await peer.send(Result(id=asked.id, result="mine").encode())
    assert await request == "mine"


async def test_an_error_answer_is_the_peers_error(wire: Wire) -> None:
    peer = await wire.introduced()
    request = asyncio.ensure_future(wire.channel.request("secret", "drain", {}, deadline=WAIT_SECONDS))
    asked = decode(await asyncio.wait_for(peer.recv(), WAIT_SECONDS))
    assert isinstance(asked, Request)
    await peer.send(Failure(id=asked.id, number=-32601, message="no such method").encode())
    with pytest.raises(PeerError, match="no such method"):
        await request


async def test_the_end_of_an_instance_ends_what_waits_for_it(wire: Wire) -> None:
    request = asyncio.ensure_future(wire.channel.request("secret", "prepare", {}, deadline=WAIT_SECONDS))
    await asyncio.sleep(0)
    wire.channel.dismiss("secret")
    with pytest.raises(PeerGoneError):
        await request
    with pytest.raises(PeerGoneError):
        await wire.channel.request("secret", "prepare", {}, deadline=WAIT_SECONDS)


GARBAGE = [
    [b""],
    [b"", b""],
    [b"\xff\x00\xfe" * 100],
    [b"{"],
    [b'{"jsonrpc": "2.0", "id": 1, "method": "hel'],
    [b"[]"],
    [b"null"],
    [b"[" * 100_000],
    [b'{"jsonrpc":"1.0","id":1,"method":"hello"}'],
    [b'{"jsonrpc":"2.0","id":{},"method":"hello"}'],
    [b'{"jsonrpc":"2.0","id":1,"method":7}'],
    [b'{"jsonrpc":"2.0","id":1,"method":"hello","params":[]}'],
    [b'{"jsonrpc":"2.0","id":1,"result":1,"error":3}'],
    [b'{"jsonrpc":"2.0","result":1}'],
    [b'{"jsonrpc":"2.0","id":999999,"result":{}}'],
    [b'{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"x"}}'],
    [b"x"] * 50,
    [os.urandom(1000)],
]


async def test_garbage_is_survived_and_counted(wire: Wire) -> None:
    garbler = wire.peer()
    for frames in GARBAGE:
        await garbler.send_multipart(frames)
    await wire.introduced()
    # It came over another connection than the hello.
    await counted(wire, "target.garbage", 10)
    await counted(wire, "target.stale_answer")


async def test_a_giant_message_costs_its_sender_the_connection_and_nobody_else(wire: Wire) -> None:
    peer, giant = await wire.introduced(), wire.peer()
    await giant.send(b"x" * (100 << 20))
    assert await ask(peer, "status", {"text": "fine"}, 2) == Result(id=2, result={})
    assert wire.listener.heard[-1] == ("status", "fine")


async def test_a_message_just_under_the_limit_is_read(wire: Wire) -> None:
    peer = await wire.introduced()
    text = "x" * (MAX_MESSAGE_BYTES - 1000)
    assert await ask(peer, "status", {"text": text}, 2) == Result(id=2, result={})
