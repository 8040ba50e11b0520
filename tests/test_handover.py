"""Handing state over to a successor: everything or nothing, whoever ends in the middle of it."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from sdk_supervisor import SdkSupervisor, eventually, open_descriptors

from target_sdk import HandoverError, State, Successor, Target, handover, protocol
from target_sdk.handover import Predecessor, Taking
from target_sdk.protocol import Failure, Notification, Offer, Result, TakeOver

WAIT_SECONDS = 60.0
HELLO = TakeOver(pid=os.getpid(), build=7)


@pytest.fixture
def path(short_tmp: Path) -> Path:
    return short_tmp / "handover.sock"


@pytest.fixture
def predecessor(path: Path) -> Iterator[Predecessor]:
    listening = Predecessor(path)
    yield listening
    listening.close()


def taking(path: Path, timeout: float | None = WAIT_SECONDS, waiting: Callable[[], object] = int) -> Taking:
    return Taking(path, HELLO, waiting=waiting, through=int, timeout=timeout)


class Taken(threading.Thread):
    """A successor in a thread: takes over and says what became of it."""

    def __init__(self, path: Path, *, within: Callable[[State | None], object] = lambda state: None) -> None:
        super().__init__(daemon=True)
        self.state: State | None = None
        self.error: BaseException | None = None
        self._connected = threading.Event()
        self._path = path
        self._within = within
        self.start()
        assert self._connected.wait(WAIT_SECONDS)

    def run(self) -> None:
        try:
            with taking(self._path, waiting=self._connected.set) as state:
                self._within(state)
            self.state = state
        except BaseException as error:
            self.error = error

    def outcome(self) -> State | None:
        self.join(WAIT_SECONDS)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.state


@contextlib.contextmanager
def pipes(count: int) -> Iterator[list[int]]:
    """The writing ends of so many pipes, which all are one pipe."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    copies = [os.dup(writer) for _ in range(count)]
    yield [reader, *copies]
    for number in (reader, writer, *copies):
        os.close(number)


def found(predecessor: Predecessor) -> Successor:
    successor = predecessor.successor()
    assert successor is not None
    return successor


@pytest.fixture
def no_leak() -> Iterator[None]:
    gc.collect()
    before = open_descriptors()
    yield
    eventually(lambda: open_descriptors() <= before, "no more descriptors are open than before")


# --- it arrives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size"), [(0, 0), (1, 0), (0, 1), (253, 65_535), (254, 65_536), (800, 5_000_000)]
)
def test_descriptors_and_data_arrive_in_order(
    predecessor: Predecessor, path: Path, count: int, size: int
) -> None:
    data = os.urandom(size)
    successor = Taken(path)
    with pipes(count) as (reader, *given):
        found(predecessor).give(given, data)
        state = successor.outcome()
        assert state is not None
        assert state.data == data
        assert len(state.descriptors) == count
        for number, descriptor in enumerate(state.descriptors):
            assert not os.get_inheritable(descriptor)
            os.write(descriptor, b"%d," % number)
            os.close(descriptor)
        if count:
            assert os.read(reader, 1 << 16) == b"".join(b"%d," % number for number in range(count))


def test_the_predecessor_knows_who_takes_over(predecessor: Predecessor, path: Path) -> None:
    thread = Taken(path)
    successor = found(predecessor)
    assert (successor.pid, successor.build) == (os.getpid(), 7)
    successor.give([])
    thread.outcome()


def test_an_open_connection_goes_on(predecessor: Predecessor, path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = socket.create_connection(listening.getsockname())
        served, _ = listening.accept()
    client.sendall(b"before ")
    thread = Taken(path)
    found(predecessor).give([served])
    served.close()
    state = thread.outcome()
    assert state is not None
    with client, socket.socket(fileno=state.descriptors[0]) as taken:
        client.sendall(b"and after")
        assert taken.recv(16, socket.MSG_WAITALL) == b"before and after"
        taken.sendall(b"both")
        assert client.recv(100) == b"both"


@pytest.mark.anyio
async def test_both_sides_with_asyncio(predecessor: Predecessor, path: Path, no_leak: None) -> None:
    async def take() -> State | None:
        async with taking(path) as state:
            return state

    task = asyncio.create_task(take())
    while (successor := predecessor.successor()) is None:
        await asyncio.sleep(0.005)
    with pipes(300) as given:
        await successor.give_async(given, b"state")
        state = await task
        assert state is not None
        assert (len(state.descriptors), state.data) == (301, b"state")
        for descriptor in state.descriptors:
            os.close(descriptor)


def test_more_than_may_be_under_way_at_once_take_their_time(path: Path) -> None:
    """Without privileges no more descriptors are under way than a process may have open."""
    code = """
import os, resource, sys
from pathlib import Path
from target_sdk.handover import Predecessor
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700))
listening = Predecessor(Path(sys.argv[1]))
print("listening", flush=True)
sys.stdin.readline()
read, write = os.pipe()
given = [os.dup(write) for _ in range(650)]
listening.successor().give(given, b"x")
print("given", flush=True)
"""
    path.parent.chmod(0o777)
    take = """
import os, sys
from pathlib import Path
from target_sdk.handover import Taking
from target_sdk.protocol import TakeOver
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
def waiting():
    print("waiting", flush=True)
with Taking(Path(sys.argv[1]), TakeOver(pid=os.getpid()), waiting=waiting, through=int, timeout=60) as state:
    pass
print(len(state.descriptors), flush=True)
"""

    def start(code: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    with start(code) as giving:
        assert giving.stdout is not None and giving.stdin is not None
        assert giving.stdout.readline() == "listening\n"
        with start(take) as taker:
            assert taker.stdout is not None
            assert taker.stdout.readline() == "waiting\n"
            giving.stdin.write("go\n")
            giving.stdin.flush()
            assert taker.stdout.readline() == "650\n"
            assert giving.stdout.readline() == "given\n"


# --- there is nobody ----------------------------------------------------------------------------------------


def test_without_a_predecessor_there_is_nothing(path: Path, no_leak: None) -> None:
    with taking(path) as state:
        assert state is None


def test_a_name_left_behind_is_no_predecessor(path: Path, no_leak: None) -> None:
    Predecessor(path).close()
    assert path.exists()
    with taking(path) as state:
        assert state is None
    Predecessor(path).close()  # and is in nobody's way


def test_a_path_longer_than_a_socket_may_have(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    listening = Predecessor(folder / "handover.sock")
    thread = Taken(folder / "handover.sock")
    found(listening).give([], b"far away")
    state = thread.outcome()
    assert state is not None and state.data == b"far away"
    listening.close()


def test_without_a_successor_there_is_none(predecessor: Predecessor) -> None:
    assert predecessor.successor() is None


def test_the_last_one_that_is_alive_takes_over(predecessor: Predecessor, path: Path, no_leak: None) -> None:
    dead = raw_successor(path)
    first = Taken(path)
    last = Taken(path)
    dead.close()
    found(predecessor).give([], b"once")
    state = last.outcome()
    assert state is not None and state.data == b"once"
    assert first.outcome() is None


def test_a_predecessor_with_nothing_to_give(predecessor: Predecessor, path: Path) -> None:
    thread = Taken(path)
    found(predecessor).close()
    assert thread.outcome() is None


def test_a_predecessor_that_ends_before_it_has_begun(path: Path) -> None:
    listening = Predecessor(path)
    thread = Taken(path)
    listening.close()
    assert thread.outcome() is None


def test_a_predecessor_that_never_begins(predecessor: Predecessor, path: Path) -> None:
    with (
        pytest.raises(TimeoutError, match=r"not begun to hand over within 0\.05 s"),
        taking(path, timeout=0.05),
    ):
        pass
    assert predecessor.successor() is None


@pytest.mark.anyio
async def test_a_predecessor_that_never_begins_with_asyncio(predecessor: Predecessor, path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"not begun to hand over within 0\.05 s"):
        async with taking(path, timeout=0.05):
            pass
    assert predecessor.successor() is None


def test_another_user_is_sent_away(predecessor: Predecessor, path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    path.parent.chmod(0o755)
    path.chmod(0o777)
    code = """
import os, sys
from pathlib import Path
from target_sdk import HandoverError
from target_sdk.handover import Taking
from target_sdk.protocol import TakeOver
os.setresuid(65534, 65534, 65534)
try:
    with Taking(Path(sys.argv[1]), TakeOver(pid=os.getpid()), waiting=int, through=int, timeout=60):
        pass
except HandoverError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, check=True)
    assert "is user 0, and not 65534" in done.stdout
    knock = (
        code.replace("with Taking", "raise SystemExit").split("try:")[0]
        + """
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
s.send(b'{"jsonrpc":"2.0","method":"take_over","params":{"pid":1,"protocol":1,"build":null}}')
print(s.recv(100))
"""
    )
    with subprocess.Popen([sys.executable, "-c", knock, path], stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: predecessor.successor() is None and process.poll() is not None, "it was sent away")
        assert process.stdout is not None
        assert process.stdout.read() in {"b''\n", ""}


# --- somebody ends in the middle ----------------------------------------------------------------------------


def raw_successor(path: Path, hello: bytes | None = None) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(WAIT_SECONDS)
    connection.connect(str(path))
    connection.send(hello or Notification(method=TakeOver.METHOD, params=HELLO.params()).encode())
    return connection


def receive_packets(connection: socket.socket, count: int) -> None:
    for _ in range(count):
        _, ancillary, _, _ = connection.recvmsg(1 << 16, handover.ANCILLARY)
        for _, _, content in ancillary:
            numbers = array.array("i")
            numbers.frombytes(content)
            for number in numbers:
                os.close(number)


def in_a_thread(call: Callable[[], object]) -> Callable[[], BaseException | None]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def outcome() -> BaseException | None:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
        return errors[0] if errors else None

    return outcome


PACKETS = 1 + 2 + 3
"""An offer, 400 descriptors and 150,000 bytes."""


@pytest.mark.parametrize("received", range(PACKETS + 1))
def test_a_successor_that_ends_after_any_packet_leaves_everything_to_its_predecessor(
    predecessor: Predecessor, path: Path, received: int, no_leak: None
) -> None:
    connection = raw_successor(path)
    successor = found(predecessor)
    with pipes(399) as given:
        outcome = in_a_thread(lambda: successor.give(given, bytes(150_000)))
        receive_packets(connection, received)
        connection.close()
        error = outcome()
        assert isinstance(error, HandoverError), error
        assert successor.error is error
        os.write(given[-1], b"still ours")
        assert os.read(given[0], 100) == b"still ours"


@pytest.mark.parametrize("sent", range(1, PACKETS))
def test_a_predecessor_that_ends_after_any_packet_leaves_nothing_behind(
    path: Path, sent: int, no_leak: None
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        thread = Taken(path)
        connection, _ = listening.accept()
        connection.recv(1000)
        offer = Offer(descriptors=400, size=150_000)
        packets: Sequence[tuple[bytes, int]] = [
            (Notification(method=Offer.METHOD, params=offer.params()).encode(), 0),
            (b"D", 253), (b"D", 147),
            (b"B" + bytes(65_535), 0), (b"B" + bytes(65_535), 0), (b"B" + bytes(18_930), 0),
        ]  # fmt: skip
        for packet, count in packets[:sent]:
            numbers = array.array("i", [0] * count)
            connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if count else [])
        connection.close()
        with pytest.raises(HandoverError, match="in the middle"):
            thread.outcome()


def test_a_commit_that_came_before_the_end_of_the_wait_counts(
    predecessor: Predecessor, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor has committed, and its predecessor looks too late: it must not go on as well."""
    connection = raw_successor(path)
    successor = found(predecessor)
    connection.send(Notification(method="commit").encode())

    def too_late(*_: Any) -> bytes:
        raise TimeoutError("not done")

    monkeypatch.setattr(handover, "_receive", too_late)
    successor.give([])
    assert successor.error is None
    connection.close()


def test_after_the_end_of_the_wait_no_commit_is_possible(
    predecessor: Predecessor, path: Path, monkeypatch: pytest.MonkeyPatch, no_leak: None
) -> None:
    inside, given_up = threading.Event(), threading.Event()

    def within(state: State | None) -> None:
        inside.set()
        given_up.wait(WAIT_SECONDS)

    thread, receive = Taken(path, within=within), handover._receive

    def too_late(connection: socket.socket, deadline: float) -> bytes:
        """Of the one who gives: its time is up as soon as the other has everything."""
        if threading.current_thread() is thread:
            return receive(connection, deadline)
        assert inside.wait(WAIT_SECONDS)
        raise TimeoutError

    monkeypatch.setattr(handover, "_receive", too_late)
    with pipes(3) as given, pytest.raises(HandoverError, match="the successor did not take over"):
        found(predecessor).give(given)
    given_up.set()
    with pytest.raises(HandoverError, match="has given up and goes on itself"):
        thread.outcome()


def test_a_program_that_cannot_use_it_refuses(predecessor: Predecessor, path: Path, no_leak: None) -> None:
    def within(state: State | None) -> None:
        assert state is not None
        raise ValueError(f"cannot read {state.data!r}")

    thread = Taken(path, within=within)
    with pipes(3) as given, pytest.raises(HandoverError, match=r"refused: ValueError: cannot read b'v2'"):
        found(predecessor).give(given, b"v2")
    with pytest.raises(ValueError, match="cannot read"):
        thread.outcome()


def test_a_successor_without_room_for_the_descriptors_refuses(
    predecessor: Predecessor, path: Path, no_leak: None
) -> None:
    with pipes(100) as given:
        thread = Taken(path)
        successor = found(predecessor)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(given) + 20, hard))
        try:
            with pytest.raises(HandoverError, match="the successor refused: 101 descriptors do not fit"):
                successor.give(given)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with pytest.raises(HandoverError, match="RLIMIT_NOFILE"):
            thread.outcome()
        os.write(given[1], b"ours")


def test_more_than_can_be_handed_over(
    predecessor: Predecessor, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = Taken(path)
    successor = found(predecessor)
    monkeypatch.setattr(handover, "MAX_DATA", 10)
    with pytest.raises(HandoverError, match="at most 10 bytes"):
        successor.give([], b"x" * 11)
    assert thread.outcome() is None
    with pytest.raises(RuntimeError, match="only once"):
        successor.give([])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"thanks", "answered nonsense"),
        (Result(id=1, result={}).encode(), "answered neither commit nor refuse"),
        (Notification(method="refuse", params={"reason": "no"}).encode(), "refused: no"),
    ],
)
def test_what_is_no_commit_is_none(
    predecessor: Predecessor, path: Path, answer: bytes, message: str, no_leak: None
) -> None:
    connection = raw_successor(path)
    successor = found(predecessor)
    connection.send(answer)
    with pytest.raises(HandoverError, match=message):
        successor.give([])
    connection.close()


@pytest.mark.parametrize(
    "hello",
    [
        b"hello",
        Result(id=1, result={}).encode(),
        Notification(method=TakeOver.METHOD, params={"pid": "1", "protocol": 1}).encode(),
        Notification(method=TakeOver.METHOD, params={"pid": 1, "protocol": 2}).encode(),
    ],
)
def test_who_is_not_understood_takes_nothing_over(
    predecessor: Predecessor, path: Path, hello: bytes, no_leak: None
) -> None:
    connection = raw_successor(path, hello)
    assert predecessor.successor() is None
    assert connection.recv(100) == b""
    connection.close()


@pytest.mark.parametrize(
    "first",
    [
        b"offer",
        Notification(method="other").encode(),
        Notification(method=Offer.METHOD, params={"descriptors": -1, "size": 0}).encode(),
        Notification(method=Offer.METHOD, params={"descriptors": 0, "size": 1 << 40}).encode(),
    ],
)
def test_an_offer_that_is_none_is_refused(path: Path, first: bytes, no_leak: None) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        thread = Taken(path)
        connection, _ = listening.accept()
        with connection:
            connection.recv(1000)
            connection.send(first)
            assert b'"refuse"' in connection.recv(1000)
    with pytest.raises(HandoverError, match="the hand-over failed"):
        thread.outcome()


# --- as a target --------------------------------------------------------------------------------------------


@pytest.fixture
def supervisor(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SdkSupervisor]:
    with SdkSupervisor(short_tmp) as running:
        more = {protocol.ENV_HANDOVER: str(short_tmp / "handover.sock")}
        for name, value in running.environment(**more).items():
            monkeypatch.setenv(name, value)
        yield running


def test_the_drain_hands_over_and_then_drains(supervisor: SdkSupervisor, path: Path) -> None:
    done: list[object] = []
    target = Target(handlers="thread")
    target.on_handover(lambda successor: successor.give([], b"all of it"))
    target.on_drain(lambda seconds: done.append(0 < seconds <= 10))
    with target:
        with target.take_over() as state:
            assert state is None
        thread = Taken(path)
        assert isinstance(supervisor.call("drain", {"deadline": 10.0}), Result)
        taken = thread.outcome()
    assert taken is not None and taken.data == b"all of it"
    assert done == [True]


def test_a_successor_says_ready_when_it_waits_and_is_found_by_its_own_successor(
    supervisor: SdkSupervisor, predecessor: Predecessor, path: Path
) -> None:
    target = Target(handlers="thread")
    target.on_handover(lambda successor: successor.give([], b"second"))
    with target:

        def first() -> None:
            supervisor.requests("ready")
            found(predecessor).give([], b"first")

        give = in_a_thread(first)
        with target.take_over() as state:
            assert state is not None and state.data == b"first"
        assert give() is None
        thread = Taken(path)
        supervisor.call("drain", {"deadline": 10.0})
        taken = thread.outcome()
        assert taken is not None and taken.data == b"second"


@pytest.mark.parametrize("caught", [False, True])
def test_a_hand_over_that_fails_is_the_answer_to_the_drain_and_the_program_goes_on(
    supervisor: SdkSupervisor, path: Path, caught: bool
) -> None:
    drained: list[float] = []
    target = Target(handlers="thread")

    @target.on_handover
    def give(successor: Successor) -> None:
        with contextlib.suppress(HandoverError) if caught else contextlib.nullcontext():
            successor.give([], b"x")

    target.on_drain(drained.append)

    def refusing(state: State | None) -> None:
        raise ValueError("no")

    with target:
        with target.take_over():
            pass
        thread = Taken(path, within=refusing)
        answer = supervisor.call("drain", {"deadline": 10.0})
        assert isinstance(answer, Failure)
        assert answer.data == {"code": "handover.failed"}
        assert "refused: ValueError: no" in answer.message
        thread.join(WAIT_SECONDS)
        assert drained == []
        # The next one gets it.
        again = Taken(path)
        assert isinstance(supervisor.call("drain", {"deadline": 10.0}), Result)
        taken = again.outcome()
        assert taken is not None and taken.data == b"x"
    assert len(drained) == 1


@pytest.mark.anyio
async def test_async_handlers(supervisor: SdkSupervisor, path: Path) -> None:
    done: list[str] = []
    target = Target()

    @target.on_handover
    async def give(successor: Successor) -> None:
        await successor.give_async([], b"async")
        done.append("given")

    @target.on_drain
    async def drain(seconds: float) -> None:
        await asyncio.sleep(0)
        done.append("drained")

    async with target:
        async with target.take_over() as state:
            assert state is None
        thread = Taken(path)
        answer = await asyncio.to_thread(supervisor.call, "drain", {"deadline": 10.0})
        assert isinstance(answer, Result)
        taken = await asyncio.to_thread(thread.outcome)
    assert taken is not None and taken.data == b"async"
    assert done == ["given", "drained"]


def test_without_asyncsup_nothing_is_taken_over(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.delenv(protocol.ENV_ENDPOINT, raising=False)
    monkeypatch.setenv(protocol.ENV_HANDOVER, str(path))
    target = Target()
    target.on_handover(lambda successor: None)
    with pytest.raises(RuntimeError, match="a target that was entered"):
        target.take_over()
    with target, target.take_over() as state:
        assert state is None
    assert not path.exists()


def test_who_cannot_be_found_says_so(
    supervisor: SdkSupervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(protocol.ENV_HANDOVER, "/nowhere/at/all/handover.sock")
    target = Target(handlers="thread")
    target.on_handover(lambda successor: None)
    with target:
        with target.take_over() as state:
            assert state is None
        assert isinstance(supervisor.call("drain", {"deadline": 1.0}), Result)
        eventually(lambda: "no successor can take over" in caplog.text, "the warning")
    assert "cannot listen at /nowhere" in caplog.text
