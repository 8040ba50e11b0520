"""A small supervisor that speaks the target channel on a real socket: for tests of the SDK.

It runs in a thread of its own, which owns every socket; tests talk to it through locks and queues.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq

from target_sdk import protocol
from target_sdk.protocol import Failure, Message, Request, RequestId, Result, decode

WAIT_SECONDS = 60.0
TOKEN = "a-secret"

Answer = Result | Failure
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Heard:
    identity: bytes
    message: Message


class SdkSupervisor:
    """Use as a context manager; `stop` and `start` within it are a restart.

    Args:
        folder: must be short, as the paths of UNIX sockets are.
    """

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/target.sock"
        self.acknowledge = True
        """Whether the reports of an instance are answered."""
        self.known_tokens = {TOKEN}
        self.heard: list[Heard] = []
        """Everything that arrived, over all restarts."""
        self._acknowledged: set[tuple[bytes, RequestId]] = set()
        self._changed = threading.Condition()
        self._identity: bytes | None = None
        self._out: deque[list[bytes]] = deque()
        self._ids = itertools.count(1)
        self._wake_reader, self._wake_writer = -1, -1
        self._closing = False
        self._thread: threading.Thread | None = None

    def environment(self, **more: str) -> dict[str, str]:
        return {
            protocol.ENV_ENDPOINT: self.endpoint,
            protocol.ENV_TOKEN: TOKEN,
            protocol.ENV_NAME: "pricer",
            protocol.ENV_INSTANCE: "pricer:0",
            protocol.ENV_REGION: "us-east-1",
            protocol.ENV_BUILD: "200",
            **more,
        }

    def start(self) -> None:
        self._wake_reader, self._wake_writer = os.pipe()
        self._closing = False
        bound = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bound,), name="sdk-supervisor", daemon=True)
        self._thread.start()
        assert bound.wait(WAIT_SECONDS)

    def stop(self) -> None:
        """Close the socket without a word, as a supervisor does that is killed. May be started again."""
        if self._thread is None:
            return
        self._closing = True
        os.write(self._wake_writer, b"\0")
        self._thread.join()
        self._thread = None
        os.close(self._wake_reader)
        os.close(self._wake_writer)
        with self._changed:
            self._identity = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what a test does ----------------------------------------------------------------------------------

    def call(self, method: str, params: Mapping[str, Any] | None = None) -> Answer:
        """Ask the instance and wait for its answer."""
        return self.answers(self.send(method, params), 1)[0]

    def send(
        self,
        method: str,
        params: Mapping[str, Any] | None = None,
        *,
        id: RequestId | None = None,  # noqa: A002
    ) -> RequestId:
        request = Request(id=next(self._ids) if id is None else id, method=method, params=params or {})
        self.send_frames(request.encode())
        return request.id

    def send_frames(self, *frames: bytes) -> None:
        with self._changed:
            known = self._changed.wait_for(lambda: self._identity is not None, WAIT_SECONDS)
            assert known and self._identity is not None, "no instance has said hello"
            self._out.append([self._identity, *frames])
        os.write(self._wake_writer, b"\0")

    def answers(self, request_id: RequestId, count: int) -> list[Answer]:
        """Wait until this many answers to a request have arrived."""

        def found() -> list[Answer]:
            messages = (heard.message for heard in self.heard)
            return [m for m in messages if isinstance(m, Result | Failure) and m.id == request_id]

        return self._wait(found, count, f"{count} answers to request {request_id}")

    def requests(self, method: str, count: int = 1) -> list[Request]:
        """Wait until this many reports of a kind have arrived."""

        def found() -> list[Request]:
            messages = (heard.message for heard in self.heard)
            return [m for m in messages if isinstance(m, Request) and m.method == method]

        return self._wait(found, count, f"{count} x {method!r}")

    def methods(self) -> list[str]:
        """The reports that have arrived so far, in order."""
        with self._changed:
            return [heard.message.method for heard in self.heard if isinstance(heard.message, Request)]

    def _wait(self, found: Callable[[], list[T]], count: int, what: str) -> list[T]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= count, WAIT_SECONDS):
                raise AssertionError(f"waited in vain for {what}; heard {self.heard}")
            return found()

    # --- the thread ----------------------------------------------------------------------------------------

    def _run(self, bound: threading.Event) -> None:
        context = zmq.Context[zmq.Socket[bytes]]()
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.bind(self.endpoint)
        bound.set()
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(self._wake_reader, zmq.POLLIN)
        while not self._closing:
            poller.poll()
            while select.select([self._wake_reader], [], [], 0)[0]:
                os.read(self._wake_reader, 4096)
            while router.poll(0):
                identity, *frames = router.recv_multipart()
                self._hear(router, identity, frames)
            while self._out:
                with contextlib.suppress(zmq.ZMQError):  # as above
                    router.send_multipart(self._out.popleft())
        router.close()
        context.term()

    def _hear(self, router: zmq.Socket[bytes], identity: bytes, frames: list[bytes]) -> None:
        (frame,) = frames  # the SDK never sends anything else
        message = decode(frame)
        with self._changed:
            if isinstance(message, Request) and (self.acknowledge or message.method == "hello"):
                answer = self._acknowledgement(identity, message)
                with contextlib.suppress(zmq.ZMQError):  # it may have ended meanwhile
                    router.send_multipart([identity, answer.encode()])
                if (identity, message.id) in self._acknowledged:
                    return  # said again before it had heard that
                self._acknowledged.add((identity, message.id))
            self.heard.append(Heard(identity, message))
            self._changed.notify_all()

    def _acknowledgement(self, identity: bytes, request: Request) -> Answer:
        if request.method != "hello":
            if identity != self._identity:
                return Failure(id=request.id, number=protocol.APPLICATION_ERROR, message="say hello first")
            return Result(id=request.id, result={})
        if request.params["token"] not in self.known_tokens:
            return Failure(id=request.id, number=protocol.APPLICATION_ERROR, message="unknown token")
        self._identity = identity
        return Result(
            id=request.id,
            result={"name": "pricer", "instance": "pricer:0", "build": 200, "region": "us-east-1"},
        )


def prepare_params(patch: str = "p1", build: int = 300, **more: Any) -> dict[str, Any]:
    return protocol.Prepare(
        patch=patch, kind="warm", build=build, region="us-east-1", changed=["job.json"], deadline=10.0, **more
    ).params()


def reload_params(
    patch: str | None = "p1", build: int = 300, root: str = "/r", **more: Any
) -> dict[str, Any]:
    return protocol.Reload(patch=patch, build=build, root=root, changed=["job.json"], **more).params()


def voluntary_switches(thread_id: int) -> int:
    """How often a thread of this process went to sleep by itself."""
    text = Path(f"/proc/self/task/{thread_id}/status").read_text()
    return int(text.split("voluntary_ctxt_switches:\t")[1].split("\n")[0])


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)
