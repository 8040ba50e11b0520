"""What a replacement costs when it is done by hand, step by step: the figures the supervisor has to meet.

    python benchmarks/reference_handover.py [--service asgi | aiohttp | threaded] [--handovers 20]

One shared listening socket. Start the new process on it; wait until it says ready; tell the old one to drain
over the target channel; when it has answered, send SIGTERM; wait for its end. Under a load in every mode.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import zmq
from load import Load, Mode, Summary

from target_sdk import protocol
from target_sdk.protocol import Failure, Request, RequestId, Result, decode

EXAMPLES: Final = Path(__file__).resolve().parent.parent / "examples"
SERVICES: Final[dict[str, str]] = {
    "asgi": "asgi_service.py", "aiohttp": "aiohttp_service.py", "threaded": "threaded_service.py",
}  # fmt: skip

WAIT_SECONDS: Final = 60.0
DRAIN_SECONDS: Final = 20.0


class Channel:
    """The supervisor's side of the target channel, as little of it as a replacement needs.

    Everything happens in the calls of its methods; nothing runs in between.
    """

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/target.sock"
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.bind(self.endpoint)
        self._tokens: dict[bytes, str] = {}
        self._identities: dict[str, bytes] = {}
        self._ready: set[str] = set()
        self._answers: dict[RequestId | None, Result | Failure] = {}
        self._numbers = itertools.count(1)

    def close(self) -> None:
        self._router.close()
        self._context.term()

    def wait_ready(self, token: str, pid: int) -> None:
        """
        Raises:
            RuntimeError: the process ended before it was ready.
        """

        def ready() -> bool:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                raise RuntimeError(f"process {pid} ended before it was ready")
            return token in self._ready

        self._pump_until(ready, f"{token} to be ready")

    def drain(self, token: str, seconds: float) -> Result | Failure:
        """Ask an instance to drain, and wait for its answer."""
        request = Request(id=f"drain {next(self._numbers)}", method="drain", params={"deadline": seconds})
        self._router.send_multipart([self._identities[token], request.encode()])
        self._pump_until(lambda: request.id in self._answers, f"{token} to drain")
        return self._answers.pop(request.id)

    def _pump_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {WAIT_SECONDS:g} s in vain for {what}")
            if self._router.poll(100):
                identity, frame = self._router.recv_multipart()
                self._take(identity, frame)

    def _take(self, identity: bytes, frame: bytes) -> None:
        message = decode(frame)
        if isinstance(message, Result | Failure):
            self._answers[message.id] = message
        elif isinstance(message, Request):
            if message.method == "hello":
                token = str(message.params["token"])
                self._tokens[identity], self._identities[token] = token, identity
            elif message.method == "ready":
                self._ready.add(self._tokens[identity])
            self._router.send_multipart([identity, Result(id=message.id, result={}).encode()])


class Slot:
    """One program on one socket, replaced as often as one likes. Use as a context manager.

    Args:
        command: the program's; it finds the listening socket as descriptor 3.
        name: that socket's.
    """

    def __init__(
        self, command: Sequence[str], *, name: str = "web", environment: Mapping[str, str] | None = None
    ) -> None:
        self._command = command
        self._name = name
        self._environment = environment or {}
        self._folder = Path(tempfile.mkdtemp(prefix="asb-"))
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._channel = Channel(self._folder)
        self._started = 0
        self.port: int = self._listening.getsockname()[1]
        self.handover = self._folder / "handover.sock"
        """Where the program finds its predecessor."""
        self.pid = 0
        """Of the process that serves."""

    def __enter__(self) -> Self:
        try:
            self.pid = self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            _end(self.pid)
        self._channel.close()
        self._listening.close()
        shutil.rmtree(self._folder)

    def replace(self) -> Result | Failure:
        """New first, ready, drain, stop; returns what the old one answered to the drain."""
        old, token = self.pid, self._token
        self.pid = self._start()
        answer = self._channel.drain(token, DRAIN_SECONDS)
        if _end(old) not in {0, -signal.SIGTERM}:  # uvicorn sends itself the signal again, at its end
            raise RuntimeError(f"process {old} did not end well")
        return answer

    def drain(self) -> Result | Failure:
        """Only that, without a successor of ours."""
        return self._channel.drain(self._token, DRAIN_SECONDS)

    @property
    def _token(self) -> str:
        return f"token-{self._started}"

    def _start(self) -> int:
        self._started += 1
        token = self._token
        environment = {
            **os.environ,
            protocol.ENV_ENDPOINT: self._channel.endpoint,
            protocol.ENV_TOKEN: token,
            protocol.ENV_NAME: "web",
            protocol.ENV_INSTANCE: "web:0",
            protocol.ENV_BUILD: str(self._started),
            protocol.ENV_HANDOVER: str(self.handover),
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": self._name,
            **self._environment,
        }
        # The shell knows the pid that the program is going to have.
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *self._command],
            environment,
            file_actions=[(os.POSIX_SPAWN_DUP2, self._listening.fileno(), 3)],
        )
        try:
            self._channel.wait_ready(token, pid)
        except BaseException:
            _end(pid)
            raise
        return pid


def _end(pid: int) -> int:
    """Stop a process; its exit status, or the negative number of the signal that ended it."""
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} did not end {WAIT_SECONDS:g} s after SIGTERM")
        time.sleep(0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One mode: its requests during all replacements, and before and after them."""

    handovers: int
    during: Summary
    steady: Summary


def measure(
    slot: Slot, path: str, mode: Mode, *, handovers: int, rate: float, pause: float = 1.0
) -> Measured:
    """Replace the program again and again under load.

    Args:
        pause: seconds of load before the first replacement and after each.
    """
    scheme = "ws" if mode == "websocket" else "http"
    with Load(f"{scheme}://127.0.0.1:{slot.port}{path}", mode=mode, rate=rate) as load:
        time.sleep(2 * pause)
        began = time.monotonic()
        for _ in range(handovers):
            slot.replace()
            time.sleep(pause)
        ended = time.monotonic()
    return Measured(
        handovers=handovers,
        during=load.results.between(began, ended),
        steady=load.results.between(began - pause, began),
    )


CASES: Final[dict[str, tuple[str, Mode, float]]] = {
    "new": ("/", "new", 1.0),
    "keep-alive": ("/", "keep-alive", 1.0),
    "slow in flight": ("/slow", "new", 0.25),
    "websocket": ("/echo", "websocket", 1.0),
}
"""Path, mode and share of the rate."""


@contextlib.contextmanager
def service(name: str) -> Iterator[Slot]:
    with Slot([sys.executable, str(EXAMPLES / SERVICES[name])]) as slot:
        yield slot


def main() -> int:
    parser = argparse.ArgumentParser(description="Replacements by hand, under load.")
    parser.add_argument("--service", choices=SERVICES, default="asgi")
    parser.add_argument("--handovers", type=int, default=20)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--modes", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    failed = 0
    print("| connections | requests | failed | of which | p50 / p99 / max, ms | p99 without, ms | gap, ms |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for mode in options.modes:
        path, kind, share = CASES[mode]
        with service(options.service) as slot:
            measured = measure(slot, path, kind, handovers=options.handovers, rate=options.rate * share)
        during = measured.during
        kinds = ", ".join(f"{count} {name}" for name, count in during.outcomes.items() if name != "ok")
        print(
            f"| {mode} | {during.requests} | {during.failed} | {kinds} "
            f"| {during.p50:.1f} / {during.p99:.1f} / {during.max:.1f} | {measured.steady.p99:.1f} "
            f"| {during.gap:.0f} |",
            flush=True,
        )
        failed += during.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
