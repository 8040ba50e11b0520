"""What all tests share: a real supervisor to talk to, and the watch over processes left behind."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chance import EVERYTHING
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from told import pytest_terminal_summary, tell
from warm_serve import Warm

from asyncsup.client import ControlClient
from asyncsup.errors import AsyncsupError, RemoteError, SupervisorUnreachableError, TimeoutExpiredError
from asyncsup.patch import bytecode
from target_sdk.protocol import ENV_ENDPOINT

if TYPE_CHECKING:
    from test_patching import Field
    from test_shutdown import Scene

__all__ = ["pytest_terminal_summary", "tell"]  # for pytest, which looks for them here

MARK = "TESTS_OF_ASYNCSUP"
RUN_ID = uuid.uuid4().hex
os.environ[MARK] = RUN_ID
# Hundreds of supervisors are started: each would compile all modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell that runs the tests in the background has them ignore it, and every program they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis_settings.register_profile(
    "asyncsup",
    derandomize=not EVERYTHING,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
hypothesis_settings.load_profile("asyncsup")

Condition = Callable[[], Any]


LONG = (
    "test_every_step",
    "test_survival_under_load",
    "test_power_syncs",
    "test_every_syscall",
    "test_store_crash",
    "test_overlap",
    "test_patching",
    "test_power_loss",
    "test_cold_recipes",
    "test_cold_patches_under_load",
    "test_survival",
    "test_sockets",
    "test_steering",
    "test_demo",
    "test_cgroups",
    "test_churn",
    "test_many_targets",
    "test_state_machine",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: on two cores the last one would otherwise run alone."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short path: a UNIX socket's path has room for 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="as-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def wait_for(condition: Condition, what: str, timeout: float = 60.0, *, every: float = 0.01) -> Any:
    """Poll a condition that lies outside this process; returns its first true value.

    The time is for a machine with other things to do: it is used up only where something has gone wrong.
    """
    deadline = time.monotonic() + timeout
    while True:
        is_last = time.monotonic() >= deadline
        value = condition()
        if value:
            return value
        assert not is_last, f"waited {timeout:g} s in vain for {what}"
        time.sleep(every)


def free_port(count: int = 1, *, host: str = "127.0.0.1", kind: int = socket.SOCK_STREAM) -> int:
    """A port that nobody has, the first of so many in a row.

    Below those the kernel hands out, so that no connection that is made meanwhile, by whatever runs beside
    the tests, takes it before the one it is meant for does.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        first = secrets.choice(range(10_000, max(lowest, 20_000) - count))
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket(family, kind)).bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        return first


@functools.cache
def shared_bytecode() -> Path:
    """A folder for the bytecode of Python's library, for as long as the tests run."""
    folder = tempfile.mkdtemp(prefix="as-bytecode-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def alive(pid: int) -> bool:
    """Whether a process runs. It may go at any moment, also while it is looked at; a zombie is dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] not in {b"Z", b"X"}


def children_of(pid: int) -> list[int]:
    """The children of a process' first thread; none when the process is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def end_process(pid: int) -> None:
    """SIGKILL to a process, and wait until it is dead (somebody else reaps it)."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0], f"process {pid} survives SIGKILL"
    finally:
        os.close(pidfd)


class Serve:
    """A real `asyncsup serve` in a folder of its own.

    Attributes:
        process: what was started: ``asyncsup serve``.
        alone: nobody starts it again when it is killed; for tests that want to see one death, at a failpoint
            for example. Otherwise it has a keeper, as it has for users.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "asyncsup.toml"
        self.stderr = folder / "serve.err"
        self.process: subprocess.Popen[bytes] | Warm | None = None
        self.environ: dict[str, str] = {}
        self.alone = False

    def command(self, *arguments: str) -> list[str]:
        """The command line; whoever starts `serve` without `start` takes it from here."""
        alone = ["--no-keeper"] if self.alone else []
        return [sys.executable, "-m", "asyncsup", "-c", str(self.config), "serve", *alone, *arguments]

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.folder}/.asyncsup/run/control.sock"

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    def write(self, text: str) -> None:
        self.config.write_text(text, encoding="utf-8")

    def start(self, text: str | None = None) -> ControlClient:
        """Start, and return a client once it answers."""
        self.begin(text)
        return self.connect()

    def begin(self, text: str | None = None) -> None:
        """Start, whether or not it ever comes to answer."""
        if text is not None:
            self.write(text)
        self._share_bytecode()
        with self.stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env={**os.environ, **self.environ},
            )

    def _share_bytecode(self) -> None:
        """Lest the first target of every test compile Python's library for a new state directory, which takes
        it longer than all else it does."""
        shared = self.folder / ".asyncsup" / bytecode.PYCACHE / bytecode.SHARED
        with contextlib.suppress(FileExistsError):
            shared.parent.mkdir(mode=0o700, parents=True)
            shared.symlink_to(shared_bytecode())

    def connect(self) -> ControlClient:
        def answers() -> ControlClient | None:
            assert self.process is not None
            assert self.process.poll() is None, f"serve ended early:\n{self.errors()}"
            client = ControlClient(self.endpoint)
            try:
                client.call("supervisor.info", timeout=20)
            except (SupervisorUnreachableError, TimeoutExpiredError):
                # Not there yet, or killed before it had answered.
                client.close()
                return None
            return client

        client: ControlClient = wait_for(answers, "the supervisor to answer", 60.0)
        return client

    def connect_to_next(self, started: str) -> ControlClient:
        """A client of the supervisor that follows the one that was started then, which may still be there."""

        def of_another() -> ControlClient | None:
            client = self.connect()
            with contextlib.suppress(SupervisorUnreachableError, TimeoutExpiredError):
                if client.call("supervisor.info", timeout=20)["started"] != started:
                    return client
            client.close()
            return None

        client: ControlClient = wait_for(of_another, "the next supervisor")
        return client

    def errors(self) -> str:
        return self.stderr.read_text(errors="replace") if self.stderr.exists() else ""

    @property
    def supervisor(self) -> int:
        """The pid of the supervisor proper; 0 while the keeper has none."""
        assert self.process is not None
        if self.alone:
            return self.process.pid
        for pid in children_of(self.process.pid):
            with contextlib.suppress(OSError):
                if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return pid
        return 0

    def kill_supervisor(self) -> int:
        """SIGKILL to the supervisor; its keeper will start another one. Returns the pid it had."""
        pid: int = wait_for(lambda: self.supervisor, "a supervisor to kill")
        end_process(pid)
        return pid

    def kill(self) -> None:
        """End it as a crash or the OOM killer would, with its keeper, so that nobody starts it again. Its
        targets run on."""
        assert self.process is not None
        supervisor = self.supervisor
        with contextlib.ExitStack() as stack:
            if supervisor and not self.alone:
                # It ends with its keeper, a moment later, if it has not ended by now.
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(supervisor)
                    stack.callback(os.close, pidfd)
                    stack.callback(select.select, [pidfd], [], [], 60)
            self.process.kill()
            self.process.wait()

    def stop(self, *, timeout: float = 60.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


class Asked:
    """A request under way, on a connection of its own."""

    def __init__(self, endpoint: str, method: str, **params: Any) -> None:
        self.outcome: list[Any] = []

        def ask() -> None:
            with ControlClient(endpoint) as client:
                try:
                    self.outcome.append(client.call(method, params))
                except AsyncsupError as error:
                    self.outcome.append(error)

        self._thread = threading.Thread(target=ask, daemon=True)
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        return bool(self.outcome)

    def answer(self) -> Any:
        """Its result, or its error."""
        wait_for(lambda: self.outcome, "an answer", timeout=100)
        return self.outcome[0]

    def result(self) -> Any:
        answer = self.answer()
        assert not isinstance(answer, AsyncsupError), answer.message
        return answer

    def error(self, code: str) -> RemoteError:
        answer = self.answer()
        assert isinstance(answer, RemoteError), answer
        assert answer.error_code == code, answer.message
        return answer


@pytest.fixture
def serve(short_tmp: Path) -> Iterator[Serve]:
    server = Serve(short_tmp)
    yield server
    if server.process is not None:
        server.stop()
        assert "Traceback" not in server.errors(), server.errors()


@pytest.fixture
def field(serve: Serve) -> Iterator[Field]:
    """A supervisor (of the module's own `serve`, if it has one) with patchable targets; not started yet."""
    from test_patching import Field

    field = Field(serve)
    yield field
    if hasattr(field, "client"):
        field.client.close()


@pytest.fixture
def scene(serve: Serve) -> Iterator[Scene]:
    """Programs that end when they are let go."""
    from test_shutdown import Scene

    yield Scene(serve)
    if serve.process is not None:
        for path in serve.folder.glob("*.started"):
            path.with_suffix(".let-go").touch()
        serve.stop()
    for pid in targets_in(serve.folder):
        with contextlib.suppress(ProcessLookupError):
            end_process(pid)


def environments() -> Iterator[tuple[Path, list[bytes]]]:
    """Every other process of this run of the tests, started directly or not: its folder in /proc, and its
    variables."""
    mark = f"{MARK}={RUN_ID}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark in variables:
            yield entry, variables


def targets_in(folder: Path) -> list[int]:
    """The pids of the targets of the supervisor in a folder: they outlive it."""
    endpoint = f"{ENV_ENDPOINT}=ipc://{folder}/".encode()
    return sorted(
        int(entry.name)
        for entry, variables in environments()
        if any(variable.startswith(endpoint) for variable in variables)
    )


def processes_of_this_run() -> list[str]:
    """Everything that was started by this run of the tests and still lives."""
    found = []
    for entry, _ in environments():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if command:
            found.append(f"{entry.name} {command}")
    return found


@pytest.fixture(scope="session", autouse=True)
def no_process_left_behind() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 30
    while processes_of_this_run() and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes_of_this_run()
    assert not left, "processes left behind:\n" + "\n".join(left)
