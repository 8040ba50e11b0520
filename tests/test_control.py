"""The control socket: whatever comes in, an answer or silence, and the supervisor goes on."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import zmq
from conftest import Serve, wait_for

from asyncsup.client import ControlClient

CONFIG = '[target.web]\ncommand = "sleep 3600"\n'


class Peer:
    """A raw socket, to say what no client would."""

    def __init__(self, endpoint: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.endpoint = endpoint
        self.sockets: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int, endpoint: str | None = None) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.rcvtimeo = 60_000
        socket.connect(endpoint or self.endpoint)
        self.sockets.append(socket)
        return socket

    def close(self) -> None:
        for socket in self.sockets:
            socket.close()
        self.context.destroy(0)


@pytest.fixture
def peer(serve: Serve) -> Iterator[Peer]:
    serve.start(CONFIG).close()
    peer = Peer(serve.endpoint)
    yield peer
    peer.close()


@pytest.fixture(scope="module")
def lasting_peer() -> Iterator[Peer]:
    """Of a supervisor that has heard all that others have said to it."""
    with tempfile.TemporaryDirectory(prefix="as-") as folder:
        serve = Serve(Path(folder))
        try:
            serve.start(CONFIG).close()
            peer = Peer(serve.endpoint)
            yield peer
            peer.close()
        finally:
            if serve.process is not None:
                serve.stop()
        assert "Traceback" not in serve.errors(), serve.errors()


def ask(socket: zmq.Socket[bytes], message: Any) -> Any:
    socket.send(message if isinstance(message, bytes) else json.dumps(message).encode())
    return orjson.loads(socket.recv())


def call(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def test_a_plain_req_socket_works(peer: Peer) -> None:
    socket = peer.socket(zmq.REQ)
    for _ in range(3):
        answer = ask(socket, call("status"))
        assert answer["id"] == 1
        assert answer["result"]["targets"][0]["name"] == "web"


def test_a_dealer_works_with_and_without_the_delimiter(peer: Peer) -> None:
    socket = peer.socket(zmq.DEALER)
    socket.send(orjson.dumps(call("supervisor.info")))
    assert len(socket.recv_multipart()) == 1
    socket.send_multipart([b"", orjson.dumps(call("supervisor.info"))])
    frames = socket.recv_multipart()
    assert frames[0] == b""
    assert orjson.loads(frames[1])["result"]["protocol"] == 1


def test_the_sockets_are_closed_to_others(serve: Serve, peer: Peer) -> None:
    run = serve.folder / ".asyncsup/run"
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    for name in ("control.sock", "events.sock", "target.sock"):
        assert stat.S_IMODE((run / name).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b'{"jsonrpc": "2.0", "id": 1, "meth', -32700),
        (b"\xff\xfe", -32700),
        (b"[]", -32600),
        (b'[{"jsonrpc":"2.0","id":1,"method":"status"}]', -32600),
        (b"3", -32600),
        (b'{"id":1,"method":"status"}', -32600),
        (b'{"jsonrpc":"2.0","id":1.5,"method":"status"}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":["status"]}', -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"status","params":["web"]}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"no.such"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"__init__"}', -32601),
        (call("status", names="web"), -32602),
        (call("status", names=[1]), -32602),
        (call("status", nmaes=["web"]), -32602),
        (call("start"), -32602),
        (call("start", names=["web"], wait="yes"), -32602),
        (call("start", names=["web"], timeout=-1), -32602),
        (call("wait", names=["web"]), -32602),
        (call("wait", names=["web"], **{"for": "godot"}), -32602),
        (call("signal", names=["web"], signal="SIGNOPE"), -32602),
        (call("signal", names=["web"], signal="99"), -32602),
        (call("logs", name="web", lines=-1), -32602),
        (call("logs", name="web", lines=True), -32602),
        (call("logs.follow", cursors=[{"instance": 3}]), -32602),
        (call("cancel", id=4711), -32602),
        (call("cancel", id={}), -32602),
        (call("events.since", seq="x"), -32602),
        (call("patch.upload", data="!!!"), -32602),
        (call("patch.upload", data="AAAA", offset=5), -32602),
        (call("patch.upload", data="AAAA", upload="../../etc/passwd"), -32602),
        (call("patch.upload", data="A" * 700_000), -32602),
        (call("patch.apply"), -32602),
        (call("patch.apply", path="relative.zip"), -32602),
        (call("patch.apply", path="/a.zip", name="b.zip"), -32602),
        (call("patch.apply", path="/a.zip", sha256="abc"), -32602),
        (call("patch.rollback", target=None), -32602),
        (call("status", names=["nobody"]), -32000),
        (call("patch.apply", path="/nowhere/at/all.zip"), -32000),
        (call("patch.apply", name="nothing.zip"), -32000),
        (call("patch.show", id="999"), -32000),
        (call("patch.rollback", target="web"), -32000),
    ],
)
def test_a_wrong_request_gets_a_json_rpc_error(lasting_peer: Peer, message: Any, number: int) -> None:
    answer = ask(lasting_peer.socket(zmq.REQ), message)
    assert answer["error"]["code"] == number, answer
    assert answer["error"]["message"]
    # What the supervisor refuses it refuses with a stable code of its own.
    if number in {-32000, -32601} or (number == -32602 and isinstance(message, dict)):
        assert answer["error"]["data"]["code"]


def test_shapes_that_are_no_message_are_dropped_and_counted(serve: Serve, peer: Peer) -> None:
    for endpoint in (serve.endpoint, f"ipc://{serve.folder}/.asyncsup/run/target.sock"):
        socket = peer.socket(zmq.DEALER, endpoint)
        for frames in ([b"a", b"b"], [b""] * 10, [b"x"] * 200, [b"", b"", b""], [os.urandom(300)]):
            socket.send_multipart(frames)
    asking = peer.socket(zmq.REQ)

    def counters() -> dict[str, int]:
        found: dict[str, int] = ask(asking, call("supervisor.info"))["result"]["counters"]
        return found

    # What comes over one connection may be heard after what comes over another one.
    for counter in ("control.garbage", "control.oversized"):
        wait_for(lambda counter=counter: counters().get(counter), counter)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["control.sock", "target.sock", "events.sock"])
def test_a_hundred_megabytes_are_survived(serve: Serve, peer: Peer, name: str) -> None:
    kind = zmq.XSUB if name == "events.sock" else zmq.DEALER
    socket = peer.socket(kind, f"ipc://{serve.folder}/.asyncsup/run/{name}")
    socket.send(b"x" * (100 << 20))
    assert "result" in ask(peer.socket(zmq.REQ), call("status"))


def test_noise_below_zeromq_is_survived(serve: Serve, peer: Peer) -> None:
    import socket as plain

    for name in ("control.sock", "target.sock", "events.sock"):
        for data in (b"", os.urandom(500), b"GET / HTTP/1.1\r\n\r\n", b"\xff" + b"\0" * 8 + b"\x7f"):
            with plain.socket(plain.AF_UNIX) as raw:
                raw.connect(str(serve.folder / ".asyncsup/run" / name))
                raw.sendall(data)
    assert "result" in ask(peer.socket(zmq.REQ), call("status"))


def test_one_connection_can_have_many_requests_under_way(peer: Peer) -> None:
    socket = peer.socket(zmq.DEALER)
    with ControlClient(peer.endpoint) as client:
        client.call("wait", {"names": ["web"], "for": "running", "timeout": 60})
    waiting = {**call("wait", names=["web"], **{"for": "stopped"}, timeout=100), "id": "slow"}
    socket.send(orjson.dumps(waiting))
    socket.send(orjson.dumps({**call("status"), "id": "quick"}))
    assert orjson.loads(socket.recv())["id"] == "quick"
    socket.send(orjson.dumps({**call("status"), "id": "slow"}))
    assert orjson.loads(socket.recv())["error"]["data"]["code"] == "request.repeated_id"
    socket.send(orjson.dumps({**call("cancel", id="slow"), "id": "cancel"}))
    answers = {answer["id"]: answer for answer in (orjson.loads(socket.recv()) for _ in range(2))}
    assert answers["cancel"]["result"] == {}
    assert answers["slow"]["error"]["data"]["code"] == "request.cancelled"
