"""New connections are steered away from a program before its stop, whatever the program knows."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from conftest import Asked, Serve, free_port, wait_for
from test_overlap import PATIENCE, Client, Post, Town

from asyncsup import steering as steering_of_asyncsup
from asyncsup.child import read_facts
from asyncsup.pidfds import copy_descriptor
from asyncsup.steering import steer_away

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from cold_patches import START_SECONDS, Patched
from load import Load

T = TypeVar("T")

SYS_PIDFD_GETFD = 438

ECHO = """
import asyncio, os, socket, sys

async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(f"{os.getpid()}\\n".encode())
    writer.close()

class Datagrams(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, peer):
        self.transport.sendto(f"{os.getpid()}\\n".encode(), peer)

async def main():
    for number in map(int, sys.argv[2:]):
        listening = socket.socket(fileno=os.dup(number))
        if listening.type == socket.SOCK_DGRAM:
            loop = asyncio.get_running_loop()
            servers.append(await loop.create_datagram_endpoint(Datagrams, sock=listening))
            continue
        start = asyncio.start_unix_server if listening.family == socket.AF_UNIX else asyncio.start_server
        servers.append(await start(echo, sock=listening))
    print("up", flush=True)
    await asyncio.Event().wait()

servers = []
if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""
"""Answers everything with its pid, on the sockets that are its arguments."""


@pytest.fixture(scope="module")
def steering() -> None:
    """Skips where the host does not let us: what is done then has tests that do without this."""
    with socket.create_server(("127.0.0.1", 0)) as listening, echo("asyncio", listening) as pid:
        try:
            steer_away([pid], [listening])
        except OSError as error:
            pytest.skip(f"this host does not let us steer: {error}")


@contextlib.contextmanager
def echo(loop: str, *sockets: socket.socket) -> Iterator[int]:
    numbers = [each.fileno() for each in sockets]
    process = subprocess.Popen(
        [sys.executable, "-c", ECHO, loop, *map(str, numbers)],
        pass_fds=numbers,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == b"up\n"
            yield process.pid
        finally:
            process.kill()


def connected(listening: socket.socket) -> socket.socket:
    made = socket.socket(listening.family)
    made.settimeout(PATIENCE)
    made.connect(listening.getsockname())
    return made


def asked(connection: socket.socket) -> int:
    connection.sendall(b"?")
    return int(connection.recv(100))


def descriptors() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())


@pytest.fixture(params=["tcp", "ipv6", "unix"])
def listening(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[socket.socket]:
    try:
        if request.param == "unix":
            made = socket.socket(socket.AF_UNIX)
            made.bind(str(short_tmp / "s"))
            made.listen()
        elif request.param == "ipv6":
            made = socket.create_server(("::1", 0), family=socket.AF_INET6)
        else:
            made = socket.create_server(("127.0.0.1", 0))
    except OSError as error:
        pytest.skip(f"no {request.param} here: {error}")
    with made:
        yield made


@pytest.mark.usefixtures("steering")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_who_is_steered_away_from_goes_on_with_what_it_has_and_takes_nothing_new(
    listening: socket.socket, loop: str
) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    with echo(loop, listening) as old, connected(listening) as kept:
        assert asked(kept) == old
        gc.collect()
        ours = descriptors()
        assert steer_away([old], [listening]) == 1
        assert set(descriptors()) <= set(ours)
        assert asked(kept) == old
        with connected(listening) as waiting:
            waiting.sendall(b"?")
            with echo(loop, listening) as new:
                assert int(waiting.recv(100)) == new
                assert asked(kept) == old
        assert steer_away([old], [listening]) == 0


def is_asleep(pid: int) -> bool:
    facts = read_facts(pid)
    return facts is not None and facts.state == "S"


def datagram_socket(kind: str, path: Path) -> socket.socket:
    """Bound; skips where there is no such kind."""
    kinds: dict[str, tuple[socket.AddressFamily, Any]] = {
        "udp": (socket.AF_INET, ("127.0.0.1", 0)),
        "udp6": (socket.AF_INET6, ("::1", 0)),
        "unixgram": (socket.AF_UNIX, str(path)),
    }
    family, address = kinds[kind]
    made = socket.socket(family, socket.SOCK_DGRAM)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        pytest.skip(f"no {kind} here: {error}")
    made.settimeout(PATIENCE)
    return made


@pytest.mark.usefixtures("steering")
@pytest.mark.parametrize(
    ("kind", "loop"),
    [("udp", "asyncio"), ("udp", "uvloop"), ("udp6", "asyncio"), ("udp6", "uvloop"), ("unixgram", "asyncio")],
)
def test_datagrams_go_to_the_others(short_tmp: Path, kind: str, loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    with (
        datagram_socket(kind, short_tmp / "service") as given,
        datagram_socket(kind, short_tmp / "client") as client,
        echo(loop, given) as old,
    ):
        client.connect(given.getsockname())
        assert asked(client) == old
        # libuv looks once more right after an answer, and would find what comes next.
        wait_for(lambda: is_asleep(old), "it to wait")
        assert steer_away([old], [given]) == 1
        client.send(b"?")
        with echo(loop, given) as new:
            assert int(client.recv(100)) == new
            assert asked(client) == new
        assert steer_away([old], [given]) == 0


@pytest.mark.usefixtures("steering")
def test_all_processes_and_sockets_at_once_and_no_others() -> None:
    with contextlib.ExitStack() as stack:
        first, second, other = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3))
        pids = [stack.enter_context(echo("asyncio", first, second, other)) for _ in range(2)]
        assert steer_away([*pids, os.getpid()], [first, second]) == 4
        with connected(other) as connection:
            assert asked(connection) in pids
        with connected(first) as connection:
            stack.enter_context(echo("asyncio", first))
            assert asked(connection) not in pids


def test_who_is_gone_waits_for_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        with echo("asyncio", listening) as pid:
            pass
        assert steer_away([pid], [listening]) == 0


WAITER = """
import os, select, socket, sys

listening = socket.socket(fileno=int(sys.argv[1]))
waiting = select.epoll()
waiting.register(listening, eval(sys.argv[2]))
connections = []
print("up", flush=True)
for line in sys.stdin:
    try:
        if line == "take\\n":
            assert waiting.poll(60) == [(listening.fileno(), select.EPOLLIN)]
            connections.append(listening.accept())
        elif line == "wait\\n":
            assert waiting.poll(0.1) == []
        elif line == "leave\\n":
            waiting.unregister(listening)
        print("ok", flush=True)
    except Exception as error:
        print(repr(error), flush=True)
"""
"""Waits for a socket with epoll(7) itself, and does what it is told."""


class Waiter:
    """A program that does what it is told.

    Args:
        events: what it asks epoll(7) for.
    """

    def __init__(self, listening: socket.socket, events: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WAITER, str(listening.fileno()), events],
            pass_fds=[listening.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.pid = self._process.pid
        assert self._hear() == "up"

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, what: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._hear()

    def __enter__(self) -> Waiter:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.mark.usefixtures("steering")
def test_a_program_finds_its_socket_where_it_has_put_it() -> None:
    """Twisted, and nginx with a mutex, do wrong things when it is not there."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Waiter(listening, "select.EPOLLIN | select.EPOLLET") as program,
    ):
        assert steer_away([program.pid], [listening]) == 1
        with connected(listening):
            assert program.tell("wait") == "ok"
        assert program.tell("leave") == "ok"


@pytest.mark.usefixtures("steering")
def test_one_that_shares_the_waiting_is_steered_as_well() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Waiter(listening, "select.EPOLLIN | select.EPOLLEXCLUSIVE") as program,
    ):
        assert steer_away([program.pid], [listening]) == 1
        with connected(listening):
            assert program.tell("wait") == "ok"


@pytest.mark.usefixtures("steering")
def test_one_that_has_not_asked_again_yet_is_steered_as_well() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        Waiter(listening, "select.EPOLLIN | select.EPOLLONESHOT") as program,
        connected(listening),
    ):
        assert program.tell("take") == "ok"
        assert steer_away([program.pid], [listening]) == 1
        assert steer_away([program.pid], [listening]) == 0


@pytest.mark.usefixtures("steering")
def test_one_that_cannot_be_steered_keeps_no_other_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [PermissionError(errno.EPERM, "not allowed")]

    def refused_once(pidfd: int, number: int) -> int:
        if refusals:
            raise refusals.pop()
        return copy_descriptor(pidfd, number)

    monkeypatch.setattr(steering_of_asyncsup, "copy_descriptor", refused_once)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        pids = [stack.enter_context(echo("asyncio", listening)) for _ in range(3)]
        assert steer_away(pids, [listening]) == 2


@pytest.mark.usefixtures("steering")
def test_one_whose_number_was_another_s_a_moment_ago_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        echo("asyncio", listening) as old,
        echo("asyncio", listening) as new,
    ):
        monkeypatch.setattr(steering_of_asyncsup, "group_members", lambda *_: [old, new])
        assert steer_away([old], [listening]) == 1
        with connected(listening) as connection:
            assert asked(connection) == new


def without_pidfd_getfd(work: Callable[[], T]) -> T:
    """What comes of some work, of a thread to which the kernel refuses that call, and its child processes."""
    load, equal, answer = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = b"".join(
        struct.pack("HBBI", *one)
        for one in (
            (load, 0, 0, 0),  # the number of the call
            (equal, 0, 1, SYS_PIDFD_GETFD),
            (answer, 0, 0, refuse),
            (answer, 0, 0, allow),
        )
    )

    def confined() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        code = ctypes.create_string_buffer(program)
        place = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
        filters = ctypes.create_string_buffer(place)
        # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP with SECCOMP_MODE_FILTER
        if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):
            pytest.skip(f"no seccomp here: {os.strerror(ctypes.get_errno())}")
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(confined).result()


def test_a_host_that_refuses_is_told_apart_from_a_program_that_waits_for_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, echo("asyncio", listening) as pid:
        with pytest.raises(PermissionError):
            without_pidfd_getfd(lambda: steer_away([pid], [listening]))
        with connected(listening) as connection:
            assert asked(connection) == pid


class Steered(Town):
    """Clients come with a new connection for each question, to a program that does the worst at its stop."""

    readiness = 'ready.log = "up"'

    def __init__(self, serve: Serve, kind: str = "tcp") -> None:
        super().__init__(serve, kind, program="greedy.py")

    def use(self) -> None:
        self.clients = [Client(self.address, keep=False) for _ in range(3)]
        for client in self.clients:
            client.start()


@pytest.fixture
def town(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Steered]:
    """On a TCP socket, unless the test says otherwise."""
    made = Steered(serve, getattr(request, "param", "tcp"))
    yield made
    made.close()


@pytest.mark.usefixtures("steering")
@pytest.mark.parametrize(("town", "patches"), [("tcp", 10), ("ipv6", 3), ("unix", 3)], indirect=["town"])
def test_cold_patches_of_a_program_that_knows_nothing_lose_no_new_connection(
    town: Steered, patches: int
) -> None:
    town.start()
    town.use()
    town.heard("v1")
    versions = [f"v{number}" for number in range(2, 2 + patches)]
    for version in versions:
        town.apply(version)
        town.wait_alone()
        town.heard(version)
    assert set(town.unharmed()) == {"v1", *versions}


@pytest.mark.usefixtures("steering")
def test_cold_patches_of_a_program_that_knows_nothing_lose_no_datagram(serve: Serve) -> None:
    with contextlib.closing(Post(serve, "dies")) as post:
        post.is_patched_without_a_loss()


@pytest.mark.usefixtures("steering")
def test_several_instances_in_turn(town: Steered) -> None:
    town.start("instances = 3", patch="max_parallel = 1")
    before = town.pids
    town.use()
    town.apply("v2")
    town.wait_alone()
    town.control.call("restart", {"names": ["app"], "rolling": True}, timeout=60)
    town.wait_alone()
    assert not set(town.pids) & set(before)
    town.heard("v2")
    town.unharmed()


@pytest.mark.usefixtures("steering")
def test_one_with_the_sdk_and_no_handler_for_a_drain(town: Steered) -> None:
    (town.root / "service.py").write_text(town.source.replace('MODE = "ok"', 'MODE = "deaf"'))
    town.readiness = 'protocol = "sdk"'
    town.start()
    town.use()
    town.apply("v2", "deaf")
    town.wait_alone()
    town.unharmed()


@pytest.mark.usefixtures("steering")
def test_a_build_that_serves_and_is_never_ready_goes_as_quietly(town: Steered) -> None:
    town.start()
    before = town.pids
    town.use()
    asked = Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2", "mute"))
    wait_for(lambda: any("v2" in client.answers for client in town.clients), "an answer of it", 60.0)
    town.control.call("patch.abort", {"id": "1"}, timeout=60)
    wait_for(lambda: asked.is_answered, "the end of the patch")
    town.wait_alone()
    assert town.pids == before
    town.unharmed()


@pytest.mark.usefixtures("steering")
def test_a_patch_that_is_taken_back_by_hand_costs_nothing(town: Steered) -> None:
    town.start(patch='commit = "manual"')
    before = town.pids
    town.use()
    txn = town.apply("v2")["txn"]
    town.control.call("patch.abort", {"id": str(txn)})
    town.wait_alone()
    assert town.pids == before
    town.unharmed()


@pytest.mark.skipif(os.geteuid() != 0, reason="a host may let only root steer whom another has started")
@pytest.mark.usefixtures("steering")
def test_a_supervisor_killed_while_the_old_one_is_on_its_way_out(town: Steered) -> None:
    town.start()
    town.use()
    town.apply("v2")
    town.serve.kill_supervisor()
    town.again()
    town.wait_alone()
    assert town.ask() == "v2"
    town.unharmed()


def test_where_the_host_refuses_everything_else_is_done_and_it_is_said(town: Steered) -> None:
    without_pidfd_getfd(town.start)
    for version in ("v2", "v3"):
        town.apply(version)
        town.wait_alone()
        assert town.ask() == version
    assert town.serve.errors().count("go on taking connections") == 1


def test_a_drain_of_no_time_steers_nothing(town: Steered) -> None:
    town.start('drain_timeout = "0s"')
    town.apply("v2")
    town.wait_alone()
    assert town.ask() == "v2"


@pytest.mark.usefixtures("steering")
@pytest.mark.timeout(300)
def test_a_stock_server_loses_no_new_connection(serve: Serve) -> None:
    service = Patched(serve.folder, stock=True, port=free_port())
    with (
        serve.start(service.settings.replace(f'"{START_SECONDS}s"', '"60s"')) as control,
        Load(f"http://127.0.0.1:{service.port}/", rate=100, timeout=60) as load,
    ):
        control.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        begin = len(load.results.samples)
        for _ in range(10):
            service.change(control)()
        wait_for(lambda: len(load.results.samples) > begin + 50, "requests after the last one")
    assert load.results.between().failed == 0, load.results.between()
