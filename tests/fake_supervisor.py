"""A small supervisor that speaks the control protocol on real sockets: for tests of its clients.

It knows a few methods by itself; a test gives it others as functions. It runs in a thread of its own, and
every socket belongs to that thread.
"""

from __future__ import annotations

import binascii
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

PENDING = object()
"""What a handler returns that answers later, by `FakeSupervisor.answer`, or never."""

WAIT_SECONDS = 60.0
"""How long a test waits for what must happen."""


class RefusalError(Exception):
    """What a handler raises to answer with an error, as the supervisor words its own."""

    def __init__(self, text: str, *, code: str, exit_status: int, **details: Any) -> None:
        super().__init__(text)
        self.message = text
        self.data = {"code": code, "exit_status": exit_status, **details}


class Call:
    """One request, as a handler sees it."""

    def __init__(self, frames: list[bytes], request: Mapping[str, Any]) -> None:
        self.envelope = frames[:-1]
        self.id = request["id"]
        self.method: str = request["method"]
        self.params: Mapping[str, Any] = request["params"]


Handler = Callable[[Call], Any]


class FakeSupervisor:
    """Use as a context manager. ``folder`` must be short: UNIX socket paths are."""

    def __init__(self, folder: Path, handlers: Mapping[str, Handler] | None = None) -> None:
        self.folder = folder
        self.endpoint = f"ipc://{folder}/control.sock"
        self.handlers: dict[str, Handler] = {
            "supervisor.info": self._info,
            "events.since": self._events_since,
            "patch.upload": self._upload,
            "cancel": lambda _: {},
            **(handlers or {}),
        }
        self.info: dict[str, Any] = {
            "version": "0.1.0", "protocol": 1, "pid": 4711, "region": "us-east-1", "config": "/etc/a.toml",
            "state_dir": str(folder), "runtime_dir": str(folder), "started": repr(time.time_ns()),
            "uptime": 12.5, "trust": "digest", "inbox": str(folder / "inbox"), "targets": 1, "counters": {},
        }  # fmt: skip
        self.calls: list[Call] = []
        self.events: list[dict[str, Any]] = []
        self.oldest = 1
        self.page = 2000
        self.uploads: dict[str, bytearray] = {}
        self._seq = 0
        self._changed = threading.Condition()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._orders: list[Callable[[], None]] = []
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://wake")
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake supervisor")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(WAIT_SECONDS)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End at once, as one that was killed: nobody is told. May be called twice."""
        if self._thread.is_alive():
            self._order(self._end)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        if not self._wake.closed:
            self._wake.close()
            self._context.term()

    # --- for tests ------------------------------------------------------------------------------------------

    def emit(self, kind: str, *, publish: bool = True, **fields: Any) -> int:
        """Make an event happen; without ``publish`` subscribers miss it. Returns its number."""
        self._seq += 1
        event = {"seq": self._seq, "at": f"2026-11-22T10:00:{self._seq % 60:02}.000Z", "type": kind, **fields}
        self.events.append(event)
        if publish:
            message = json.dumps({"jsonrpc": "2.0", "method": "event", "params": event}).encode()
            self.publish(kind.encode(), message)
        return self._seq

    def publish(self, *frames: bytes) -> None:
        """Send anything at all to the subscribers."""
        self._order(lambda: (self._publisher.send_multipart(frames), None)[1])

    def answer(self, call: Call, result: Any) -> None:
        """Answer a call whose handler returned `PENDING`."""
        self._order(lambda: self._send(call, {"result": result}))

    def wait_for(self, method: str, count: int = 1) -> Call:
        """The ``count``-th call of ``method``, once it has come."""

        def found() -> Call | None:
            calls = [call for call in self.calls if call.method == method]
            return calls[count - 1] if len(calls) >= count else None

        with self._changed:
            call = self._changed.wait_for(found, WAIT_SECONDS)
        assert call is not None, f"no {method} among {[call.method for call in self.calls]}"
        return call

    def called(self, method: str) -> list[Mapping[str, Any]]:
        """The parameters of every call of ``method`` so far."""
        return [call.params for call in self.calls if call.method == method]

    def wait_for_subscriber(self) -> None:
        """Until somebody's subscription has arrived at the publisher."""
        assert self._subscribed.wait(WAIT_SECONDS)

    # --- the thread -----------------------------------------------------------------------------------------

    def _order(self, what: Callable[[], None]) -> None:
        if threading.current_thread() is self._thread:
            what()
            return
        self._orders.append(what)
        self._wake.send(b"")

    def _end(self) -> None:
        self._ending = True

    def _run(self) -> None:
        self._ending = False
        self._subscribed = threading.Event()
        orders = self._context.socket(zmq.PAIR)
        orders.connect("inproc://wake")
        self._router = self._context.socket(zmq.ROUTER)
        self._publisher = self._context.socket(zmq.XPUB)
        sockets = (orders, self._router, self._publisher)
        for socket in sockets:
            # What has been said before it ends is on its way.
            socket.setsockopt(zmq.LINGER, 200)
        self._publisher.setsockopt(zmq.SNDHWM, 100_000)
        self._router.bind(self.endpoint)
        self._publisher.bind(f"ipc://{self.folder}/events.sock")
        self._listening.set()
        poller = zmq.Poller()
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        try:
            while not self._ending:
                ready = dict(poller.poll())
                if self._publisher in ready and self._publisher.recv()[:1] == b"\x01":
                    self._subscribed.set()
                if orders in ready:
                    orders.recv()
                    self._orders.pop(0)()
                if self._router in ready and not self._ending:
                    self._take(self._router.recv_multipart())
        finally:
            for socket in sockets:
                socket.close()
            for name in ("control.sock", "events.sock"):
                (self.folder / name).unlink(missing_ok=True)

    def _take(self, frames: list[bytes]) -> None:
        call = Call(frames, json.loads(frames[-1]))
        handler = self.handlers.get(call.method)
        try:
            if handler is None:
                answer: dict[str, Any] = {"error": {"code": -32601, "message": f"no method {call.method}"}}
            else:
                result = handler(call)
                answer = {} if result is PENDING else {"result": result}
        except RefusalError as refusal:
            answer = {"error": {"code": -32000, "message": refusal.message, "data": refusal.data}}
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        if answer:
            self._send(call, answer)

    def _send(self, call: Call, answer: Mapping[str, Any]) -> None:
        message = json.dumps({"jsonrpc": "2.0", "id": call.id, **answer}).encode()
        self._router.send_multipart([*call.envelope, message])

    # --- methods --------------------------------------------------------------------------------------------

    def _info(self, call: Call) -> Any:
        return {**self.info, "seq": self._seq}

    def _events_since(self, call: Call) -> Any:
        after = max(call.params["seq"], self.oldest - 1)
        events = [event for event in self.events if event["seq"] > after]
        return {"events": events[: self.page], "oldest": self.oldest, "seq": self._seq}

    def _upload(self, call: Call) -> Any:
        upload = call.params.get("upload") or f"upload-{len(self.uploads) + 1}"
        data = self.uploads.setdefault(upload, bytearray())
        if call.params["offset"] != len(data):
            raise RefusalError("not at that offset", code="request.invalid", exit_status=2)
        data += binascii.a2b_base64(call.params["data"])
        return {"upload": upload, "size": len(data)}
