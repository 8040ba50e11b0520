"""The control client against a supervisor that is a thread: real sockets, real loss, real restarts."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from conftest import Serve, wait_for
from fake_supervisor import PENDING, WAIT_SECONDS, Call, FakeSupervisor, RefusalError

from asyncsup import quick
from asyncsup.client import (
    UPLOAD_CHUNK_BYTES,
    AsyncControlClient,
    ControlClient,
    Event,
    Gap,
    exit_status_of,
    find_endpoint,
)
from asyncsup.errors import (
    AsyncsupError,
    ConfigError,
    NotAllowedError,
    RemoteError,
    SupervisorUnreachableError,
    TargetNotFoundError,
    TimeoutExpiredError,
    UsageError,
)


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[FakeSupervisor]:
    handlers: dict[str, Callable[[Call], Any]] = {
        "echo": lambda call: dict(call.params),
        "never": lambda _: PENDING,
        "refuse": _refuse,
    }
    with FakeSupervisor(tmp_path, handlers) as fake:
        yield fake


def _refuse(call: Call) -> Any:
    raise RefusalError(
        "patch is for India", code="gate.region", exit_status=20, report={"verdict": "refused"}, message="m"
    )


# --- calls --------------------------------------------------------------------------------------------------


def test_call_returns_the_result_and_leaves_out_parameters_that_are_none(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client:
        assert client.call("echo", {"timeout": 3}, names=["web"], sha256=None) == {
            "timeout": 3,
            "names": ["web"],
        }


def test_many_calls_use_one_connection(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client:
        assert [client.call("echo", n=n)["n"] for n in range(50)] == list(range(50))
    assert len({call.envelope[0] for call in supervisor.calls}) == 1


def test_an_answer_may_be_megabytes(supervisor: FakeSupervisor) -> None:
    supervisor.handlers["big"] = lambda _: "x" * 5_000_000
    with ControlClient(supervisor.endpoint) as client:
        assert len(client.call("big")) == 5_000_000


def test_an_error_keeps_its_code_exit_status_and_details(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client, pytest.raises(RemoteError) as caught:
        client.call("refuse")
    assert caught.value.error_code == "gate.region"
    assert exit_status_of(caught.value) == 20
    assert caught.value.message == "patch is for India"
    assert caught.value.details == {"report": {"verdict": "refused"}, "message": "m"}


def test_an_unknown_method_is_a_usage_error(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client, pytest.raises(RemoteError) as caught:
        client.call("nonsense")
    assert (caught.value.error_code, exit_status_of(caught.value)) == ("request.invalid", 2)


def test_exit_status_of_a_local_error_is_that_of_its_class() -> None:
    assert exit_status_of(TargetNotFoundError("no such target")) == 4


def test_no_supervisor_fails_at_once_and_says_what_to_do(tmp_path: Path) -> None:
    began = time.monotonic()
    expected = pytest.raises(
        SupervisorUnreachableError, match=r"control\.sock; start one with `asyncsup serve`"
    )
    with ControlClient(f"ipc://{tmp_path}/control.sock") as client, expected:
        client.call("status")
    assert time.monotonic() - began < WAIT_SECONDS / 2


def test_a_socket_left_behind_by_a_dead_supervisor_fails_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/control.sock")
    expected = pytest.raises(SupervisorUnreachableError, match="Connection refused")
    with ControlClient(f"ipc://{tmp_path}/control.sock") as client, expected:
        client.call("status")


def test_a_socket_of_somebody_else_is_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Root, which tests may run as, is refused by no file mode.
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with ControlClient(f"ipc://{tmp_path}/control.sock") as client, pytest.raises(NotAllowedError):
        client.call("status")


@pytest.mark.parametrize("endpoint", ["nonsense", "ipc://", "http://localhost", f"ipc:///{'x' * 200}"])
def test_what_is_no_endpoint_is_a_usage_error(endpoint: str) -> None:
    with ControlClient(endpoint) as client, pytest.raises(UsageError):
        client.call("status")


def test_a_call_without_an_answer_ends_at_its_deadline_and_is_cancelled(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client:
        with pytest.raises(TimeoutExpiredError, match=r"no answer to never within 0\.05 s"):
            client.call("never", timeout=0.05)
        assert supervisor.wait_for("cancel").params == {"id": supervisor.wait_for("never").id}
        assert client.call("echo", n=1) == {"n": 1}


def test_a_late_answer_is_not_taken_for_that_of_the_next_call(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client:
        with pytest.raises(TimeoutExpiredError):
            client.call("never", timeout=0.05)
        supervisor.answer(supervisor.wait_for("never"), "too late")
        assert client.call("echo", n=1) == {"n": 1}


def test_a_cancel_sent_just_before_closing_arrives(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client, pytest.raises(TimeoutExpiredError):
        client.call("echo")  # they are connected
        client.call("never", timeout=0.05)
    supervisor.wait_for("cancel")


def test_ctrl_c_cancels_the_request(supervisor: FakeSupervisor) -> None:
    def interrupt() -> None:
        supervisor.wait_for("never")
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with ControlClient(supervisor.endpoint) as client, pytest.raises(KeyboardInterrupt):
        client.call("never", timeout=WAIT_SECONDS)
    thread.join()
    assert supervisor.wait_for("cancel").params == {"id": supervisor.wait_for("never").id}


def test_a_supervisor_that_dies_during_a_call_is_noticed_at_once(supervisor: FakeSupervisor) -> None:
    def kill() -> None:
        supervisor.wait_for("never")
        supervisor.stop()

    thread = threading.Thread(target=kill)
    thread.start()
    with ControlClient(supervisor.endpoint) as client:
        with pytest.raises(SupervisorUnreachableError, match="went away before it answered never"):
            client.call("never", timeout=WAIT_SECONDS)
        thread.join()
        with pytest.raises(SupervisorUnreachableError, match="start one"):
            client.call("echo")


def test_the_next_supervisor_never_sees_requests_meant_for_the_dead_one(tmp_path: Path) -> None:
    with ControlClient(f"ipc://{tmp_path}/control.sock") as client:
        with FakeSupervisor(tmp_path) as first:
            client.call("supervisor.info")
            first.stop()
        with pytest.raises(SupervisorUnreachableError):
            client.call("restart", names=["web"])
        with FakeSupervisor(tmp_path) as second:
            assert client.call("supervisor.info")["seq"] == 0
            assert [call.method for call in second.calls] == ["supervisor.info"]


def test_close_may_be_called_twice(supervisor: FakeSupervisor) -> None:
    client = ControlClient(supervisor.endpoint)
    client.call("echo")
    client.close()
    client.close()


# --- one question without libzmq ----------------------------------------------------------------------------


def test_a_quick_question_is_answered_by_a_router_of_libzmq(supervisor: FakeSupervisor) -> None:
    supervisor.handlers["big"] = lambda _: "x" * 5_000_000
    assert quick.ask(supervisor.endpoint, "echo", {"n": 1, "none": None}, timeout=WAIT_SECONDS) == {"n": 1}
    long = {"text": "y" * 100_000}
    assert quick.ask(supervisor.endpoint, "echo", long, timeout=WAIT_SECONDS) == long
    assert len(quick.ask(supervisor.endpoint, "big", {}, timeout=WAIT_SECONDS)) == 5_000_000


def test_a_quick_question_fails_as_any_other(supervisor: FakeSupervisor) -> None:
    with pytest.raises(RemoteError) as caught:
        quick.ask(supervisor.endpoint, "refuse", {}, timeout=WAIT_SECONDS)
    assert exit_status_of(caught.value) == 20
    with pytest.raises(SupervisorUnreachableError, match="start one with"):
        quick.ask(f"{supervisor.endpoint}.not", "echo", {}, timeout=WAIT_SECONDS)


def test_a_quick_question_ends_at_its_deadline_and_is_cancelled(supervisor: FakeSupervisor) -> None:
    timeout = 1
    while not supervisor.called("never"):  # until there was time enough for the question itself
        with pytest.raises(TimeoutExpiredError, match=rf"no answer to never within {timeout} s"):
            quick.ask(supervisor.endpoint, "never", {}, timeout=timeout)
        timeout *= 3
    assert supervisor.wait_for("cancel").params == {"id": supervisor.wait_for("never").id}


def test_ctrl_c_cancels_a_quick_question(supervisor: FakeSupervisor) -> None:
    def interrupt() -> None:
        supervisor.wait_for("never")
        signal.pthread_kill(main, signal.SIGINT)

    main = threading.get_ident()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        quick.ask(supervisor.endpoint, "never", {}, timeout=WAIT_SECONDS)
    thread.join()
    supervisor.wait_for("cancel")


def test_a_supervisor_that_dies_during_a_quick_question_is_noticed(supervisor: FakeSupervisor) -> None:
    def kill() -> None:
        supervisor.wait_for("never")
        supervisor.stop()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SupervisorUnreachableError, match="went away before it answered never"):
        quick.ask(supervisor.endpoint, "never", {}, timeout=WAIT_SECONDS)
    thread.join()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", SupervisorUnreachableError),
        (b"HTTP/1.1 400 Bad Request\r\n" + b" " * 64, SupervisorUnreachableError),
        (GREETING[:20], SupervisorUnreachableError),
        (GREETING + b"\x04\x06\x05ERROR", SupervisorUnreachableError),
        (GREETING + b"\x02" + b"\xff" * 8, SupervisorUnreachableError),
        (GREETING + b"\x00\x04junk", SupervisorUnreachableError),
    ],
    ids=["nothing", "http", "half a greeting", "error command", "endless frame", "junk"],
)
def test_what_is_no_supervisor_is_not_taken_for_one(
    short_tmp: Path, said: bytes, error: type[AsyncsupError]
) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short_tmp}/control.sock")
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(error):
            quick.ask(f"ipc://{short_tmp}/control.sock", "status", {}, timeout=WAIT_SECONDS)
        thread.join()


def test_a_peer_that_asks_whether_we_live_is_answered(short_tmp: Path) -> None:
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(GREETING + b"\x04\x09\x04PING\x00\x0aab")
            answer = b'{"jsonrpc":"2.0","id":1,"result":5}'
            while b"PONG" not in b"".join(heard):
                heard.append(connection.recv(4096))
            connection.sendall(b"\x01\x00" + bytes([0, len(answer)]) + answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{short_tmp}/control.sock")
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        assert quick.ask(f"ipc://{short_tmp}/control.sock", "x", {}, timeout=WAIT_SECONDS) == 5
        thread.join()
    assert b"\x04\x07\x04PONGab" in b"".join(heard)


# --- uploads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, UPLOAD_CHUNK_BYTES, UPLOAD_CHUNK_BYTES + 1, 3 * UPLOAD_CHUNK_BYTES])
def test_upload_sends_the_whole_file_in_pieces_that_fit_a_message(
    supervisor: FakeSupervisor, tmp_path: Path, size: int
) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    file = tmp_path / "patch.zip"
    file.write_bytes(content[:size])
    progress: list[tuple[int, int]] = []
    with ControlClient(supervisor.endpoint) as client:
        upload = client.upload(file, on_progress=lambda done, total: progress.append((done, total)))
    assert supervisor.uploads[upload] == content[:size]
    pieces = supervisor.called("patch.upload")
    assert [piece["last"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece["data"]) < 1_000_000 for piece in pieces)
    assert progress[-1] == (size, size)


# --- events -------------------------------------------------------------------------------------------------


def test_events_arrive_in_order_from_the_moment_of_the_subscription(supervisor: FakeSupervisor) -> None:
    supervisor.emit("before")
    with ControlClient(supervisor.endpoint) as client, client.subscribe() as events:
        for n in range(5):
            supervisor.emit("patch.step", step=f"s{n}")
        seen = [_next(events.read) for _ in range(5)]
    assert [event.seq for event in seen] == [2, 3, 4, 5, 6]
    assert seen[0].type == "patch.step"
    assert seen[0].data["step"] == "s0"


def test_what_happened_before_the_subscription_arrived_is_fetched_without_another_event(
    supervisor: FakeSupervisor,
) -> None:
    with ControlClient(supervisor.endpoint) as client, client.subscribe() as events:
        supervisor.emit("unheard", publish=False)
        assert _next(events.read).type == "unheard"


def test_since_an_earlier_number_the_stored_events_come_first(supervisor: FakeSupervisor) -> None:
    for n in range(4):
        supervisor.emit(f"e{n}")
    with ControlClient(supervisor.endpoint) as client, client.subscribe(since=1) as events:
        supervisor.wait_for_subscriber()
        supervisor.emit("live")
        assert [_next(events.read).seq for _ in range(4)] == [2, 3, 4, 5]


def test_a_gap_is_reported_and_filled(supervisor: FakeSupervisor) -> None:
    gaps: list[Gap] = []
    with ControlClient(supervisor.endpoint) as client, client.subscribe(on_gap=gaps.append) as events:
        _settle(supervisor, events.read)
        supervisor.emit("missed", publish=False)
        supervisor.emit("missed", publish=False)
        supervisor.emit("seen")
        seen = [_next(events.read) for _ in range(3)]
        assert [event.type for event in seen] == ["missed", "missed", "seen"]
        assert events.read(timeout=0.05) is None
    assert gaps == [Gap(first=seen[0].seq, last=seen[2].seq, lost=0, restarted=False)]


def test_events_the_supervisor_no_longer_has_are_counted_as_lost(supervisor: FakeSupervisor) -> None:
    gaps: list[Gap] = []
    with ControlClient(supervisor.endpoint) as client, client.subscribe(on_gap=gaps.append) as events:
        last = _settle(supervisor, events.read)
        supervisor.emit("missed", publish=False)
        supervisor.emit("missed", publish=False)
        supervisor.oldest = last + 2
        supervisor.emit("seen")
        assert [_next(events.read).seq for _ in range(2)] == [last + 2, last + 3]
    assert gaps == [Gap(first=last + 1, last=last + 3, lost=1, restarted=False)]


def test_a_gap_wider_than_one_answer_is_fetched_in_pages(supervisor: FakeSupervisor) -> None:
    supervisor.page = 10
    for n in range(35):
        supervisor.emit("old", n=n)
    with ControlClient(supervisor.endpoint) as client, client.subscribe(since=0) as events:
        assert [_next(events.read).seq for _ in range(35)] == list(range(1, 36))


def test_a_fetch_that_is_cut_short_loses_nothing(supervisor: FakeSupervisor) -> None:
    """The supervisor goes between two pages; what it has said by then is read all the same."""
    supervisor.page = 10
    for n in range(35):
        supervisor.emit("old", n=n)
    answer = supervisor.handlers["events.since"]

    def second_page_fails(call: Call) -> Any:
        if call.params["seq"] == 10:
            supervisor.handlers["events.since"] = answer
            raise RefusalError("not at the moment", code="internal", exit_status=1)
        return answer(call)

    supervisor.handlers["events.since"] = second_page_fails
    with ControlClient(supervisor.endpoint) as client, client.subscribe(since=0) as events:
        with pytest.raises(RemoteError):
            events.read()
        assert [_next(events.read).seq for _ in range(35)] == list(range(1, 36))


def test_an_async_fetch_that_is_cancelled_loses_nothing(supervisor: FakeSupervisor) -> None:
    supervisor.page = 10
    for n in range(35):
        supervisor.emit("old", n=n)
    answer = supervisor.handlers["events.since"]
    supervisor.handlers["events.since"] = lambda call: PENDING if call.params["seq"] == 10 else answer(call)

    async def main() -> None:
        async with AsyncControlClient(supervisor.endpoint) as client:
            with await client.subscribe(since=0) as events:

                async def read() -> None:
                    await anext(events)

                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read)
                    await anyio.to_thread.run_sync(supervisor.wait_for, "events.since", 2)
                    tasks.cancel_scope.cancel()
                supervisor.handlers["events.since"] = answer
                with anyio.fail_after(WAIT_SECONDS):
                    assert [(await anext(events)).seq for _ in range(35)] == list(range(1, 36))

    anyio.run(main)


def test_wait_closed_returns_when_the_supervisor_has_gone(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client:
        client.call("supervisor.info")
        assert not client.wait_closed(timeout=0.05)
        supervisor.stop()
        assert client.wait_closed(timeout=WAIT_SECONDS)


def test_events_are_handed_over_while_a_call_waits(supervisor: FakeSupervisor) -> None:
    def apply(call: Call) -> Any:
        for step in ("verify", "stage", "switch"):
            supervisor.emit("patch.step", step=step)
        return PENDING

    supervisor.handlers["patch.apply"] = apply
    seen: list[Event] = []
    done = threading.Event()

    def on_event(event: Event) -> None:
        seen.append(event)
        if len(seen) == 3:
            supervisor.answer(supervisor.wait_for("patch.apply"), {"verdict": "committed"})
            done.set()

    with ControlClient(supervisor.endpoint) as client, client.subscribe() as events:
        report = client.call("patch.apply", events=events, on_event=on_event, timeout=WAIT_SECONDS)
        assert events.catch_up() == []
    assert report == {"verdict": "committed"}
    assert [event.data["step"] for event in seen] == ["verify", "stage", "switch"]


def test_catch_up_returns_what_no_socket_brought(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client, client.subscribe() as events:
        supervisor.emit("unheard", publish=False)
        assert [event.type for event in events.catch_up()] == ["unheard"]
        assert events.catch_up() == []


def test_a_stream_survives_the_death_of_the_supervisor(tmp_path: Path) -> None:
    gaps: list[Gap] = []
    with ControlClient(f"ipc://{tmp_path}/control.sock") as client:
        with FakeSupervisor(tmp_path) as first:
            events = client.subscribe(on_gap=gaps.append)
            _settle(first, events.read)
            first.emit("last words")
            assert _next(events.read).type == "last words"
            first.stop()
            with pytest.raises(SupervisorUnreachableError, match="went away"):
                events.read(timeout=WAIT_SECONDS)
            with pytest.raises(SupervisorUnreachableError, match="start one"):
                events.read(timeout=WAIT_SECONDS)
        with FakeSupervisor(tmp_path) as second:
            second.emit("supervisor.started")
            assert _next(events.read).type == "supervisor.started"
            second.emit("next")
            assert _next(events.read) == Event(2, "next", second.events[1])
    assert [(gap.first, gap.restarted) for gap in gaps] == [(1, True)]


def test_garbage_on_the_event_socket_is_not_an_event(supervisor: FakeSupervisor) -> None:
    with ControlClient(supervisor.endpoint) as client, client.subscribe() as events:
        _settle(supervisor, events.read)
        for frame in (b"", b"{", b"[]", b'{"jsonrpc":"2.0"}', b'{"jsonrpc":"2.0","params":{"seq":"x"}}'):
            supervisor.publish(b"x", frame)
        supervisor.emit("real")
        assert _next(events.read).type == "real"


def _next(read: Callable[[float], Event | None]) -> Event:
    event = read(WAIT_SECONDS)
    assert event is not None
    return event


def _settle(supervisor: FakeSupervisor, read: Callable[[float], Event | None]) -> int:
    """Wait until the subscription stands and nothing is fetched without a word any more."""
    supervisor.wait_for_subscriber()
    before = len(supervisor.called("events.since"))
    deadline = time.monotonic() + WAIT_SECONDS
    while len(supervisor.called("events.since")) == before and time.monotonic() < deadline:
        assert read(0.05) is None
    seq = supervisor.emit("settled")
    assert _next(read).seq == seq
    return seq


# --- asynchronous -------------------------------------------------------------------------------------------


def run_async(test: Callable[[], Any], backend: str = "asyncio") -> None:
    async def bounded() -> None:
        with anyio.fail_after(WAIT_SECONDS):
            await test()

    anyio.run(bounded, backend=backend)


def test_async_calls_of_several_tasks_overlap(supervisor: FakeSupervisor) -> None:
    async def main() -> None:
        answers: dict[int, Any] = {}
        rest_answered = anyio.Event()
        async with AsyncControlClient(supervisor.endpoint) as client:

            async def call(n: int) -> None:
                answers[n] = await client.call("echo" if n else "never", n=n)
                if len(answers) == 19:
                    rest_answered.set()

            async with anyio.create_task_group() as tasks:
                for n in range(20):
                    tasks.start_soon(call, n)
                await rest_answered.wait()
                supervisor.answer(supervisor.wait_for("never"), "at last")
        assert answers.pop(0) == "at last"
        assert answers == {n: {"n": n} for n in range(1, 20)}

    run_async(main)


def test_async_errors_are_those_of_the_blocking_client(supervisor: FakeSupervisor) -> None:
    async def main() -> None:
        async with AsyncControlClient(supervisor.endpoint) as client:
            with pytest.raises(RemoteError) as caught:
                await client.call("refuse")
            assert exit_status_of(caught.value) == 20
            with pytest.raises(TimeoutExpiredError, match="no answer to never"):
                await client.call("never", timeout=0.05)
            assert await client.call("echo", n=2) == {"n": 2}
        assert supervisor.wait_for("cancel").params == {"id": supervisor.wait_for("never").id}

    run_async(main)


def test_cancelling_an_async_call_cancels_the_request(supervisor: FakeSupervisor) -> None:
    async def main() -> None:
        async with AsyncControlClient(supervisor.endpoint) as client:
            with anyio.move_on_after(0.05):
                await client.call("never")
            assert await client.call("echo", n=3) == {"n": 3}
        supervisor.wait_for("cancel")

    run_async(main)


def test_async_call_notices_the_death_of_the_supervisor_and_reaches_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncControlClient(f"ipc://{tmp_path}/control.sock") as client:
            with FakeSupervisor(tmp_path, {"never": lambda _: PENDING}) as first:
                async with anyio.create_task_group() as tasks:

                    async def kill() -> None:
                        await anyio.to_thread.run_sync(first.wait_for, "never")
                        await anyio.to_thread.run_sync(first.stop)

                    tasks.start_soon(kill)
                    with pytest.raises(SupervisorUnreachableError, match="went away before it answered"):
                        await client.call("never")
            with pytest.raises(SupervisorUnreachableError, match="start one"):
                await client.call("never")
            with FakeSupervisor(tmp_path):
                assert (await client.call("supervisor.info"))["pid"] == 4711

    run_async(main)


def test_async_upload_sends_the_whole_file(supervisor: FakeSupervisor, tmp_path: Path) -> None:
    content = b"0123456789" * 60_000
    (tmp_path / "patch.zip").write_bytes(content)
    progress: list[int] = []

    async def main() -> None:
        async with AsyncControlClient(supervisor.endpoint) as client:
            upload = await client.upload(
                tmp_path / "patch.zip", on_progress=lambda done, _: progress.append(done)
            )
            assert supervisor.uploads[upload] == content

    run_async(main)
    assert progress == [UPLOAD_CHUNK_BYTES, len(content)]


def test_async_events_arrive_in_order_and_gaps_are_filled(supervisor: FakeSupervisor) -> None:
    gaps: list[Gap] = []

    async def main() -> None:
        supervisor.emit("before")
        async with AsyncControlClient(supervisor.endpoint) as client:
            with await client.subscribe(on_gap=gaps.append) as events:
                supervisor.emit("unheard", publish=False)
                assert (await anext(events)).seq == 2
                await anyio.sleep(0.3)  # past the time in which gaps are filled without a word
                supervisor.emit("first")
                assert (await anext(events)).seq == 3
                supervisor.emit("missed", publish=False)
                supervisor.emit("second")
                assert [(await anext(events)).seq for _ in range(2)] == [4, 5]
                for n in range(2000):
                    supervisor.emit("burst", n=n)
                assert [(await anext(events)).seq for _ in range(2000)] == list(range(6, 2006))

    run_async(main)
    assert [(gap.lost, gap.restarted) for gap in gaps[:1]] == [(0, False)]


def test_async_stream_survives_the_death_of_the_supervisor(tmp_path: Path) -> None:
    gaps: list[Gap] = []

    async def main() -> None:
        async with AsyncControlClient(f"ipc://{tmp_path}/control.sock") as client:
            with FakeSupervisor(tmp_path) as first:
                events = await client.subscribe(on_gap=gaps.append)
                first.emit("last words")
                assert (await anext(events)).type == "last words"
                first.stop()
                with pytest.raises(SupervisorUnreachableError, match="went away"):
                    await anext(events)
            with FakeSupervisor(tmp_path) as second:
                second.emit("supervisor.started")
                assert (await anext(events)).type == "supervisor.started"
            events.close()

    run_async(main)
    assert [gap.restarted for gap in gaps] == [True]


def test_async_client_outside_its_context_says_so(supervisor: FakeSupervisor) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="context manager"):
            await AsyncControlClient(supervisor.endpoint).call("echo")

    run_async(main)


# --- where the supervisor is --------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and home, and no variable that names a supervisor."""
    for name in ("ASYNCSUP_ENDPOINT", "ASYNCSUP_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        "",
        "[supervisor]\n",
        '[supervisor]\nregion = "here"\n',
        '[supervisor]\nstate_dir = "state"\n',
        '[supervisor]\nstate_dir = "/var/lib/../lib/asyncsup"\n',
        '[supervisor]\nruntime_dir = "../run"\nstate_dir = "state"\n',
        '[supervisor]\nruntime_dir = "//run/x"\n',
        '[supervisor]\nendpoint = "ipc:///run/other.sock"\n',
        '[supervisor]\nendpoint = "ipc://relative.sock"\nruntime_dir = "run"\n',
        '[supervisor]\nruntime_dir = "${HOME}/run"\n',
        '[supervisor]\nstate_dir = "${here}/x$$y"\n',
        '[supervisor]\nendpoint = "ipc://${HOME}/c.sock"\n',
        '[patch]\nnonsense = 1\n[target.web]\ncommand = "x"\n',
        f'[supervisor]\nruntime_dir = "{"r" * 120}"\nendpoint = "ipc:///run/short.sock"\n',
        f'[supervisor]\nendpoint = "ipc:///{"e" * 120}"\n',
        "[supervisor]\nruntime_dir = 3\n",
        '[supervisor]\nruntime_dir = ""\n',
        '[supervisor]\nruntime_dir = "~/run"\n',
        '[supervisor]\nendpoint = "tcp://127.0.0.1:1"\n',
        '[supervisor]\nendpoint = "ipc://@abstract"\n',
        '[supervisor]\nendpoint = "ipc://"\n',
        "supervisor = 3\n",
        "[supervisor\n",
        "\xff",
    ],
    ids=lambda settings: settings[:40].replace("\n", " "),
)
def test_the_short_way_to_the_endpoint_agrees_with_the_configuration_reader(
    elsewhere: Path, settings: str
) -> None:
    from asyncsup.config import load_supervisor

    file = elsewhere / "asyncsup.toml"
    file.write_bytes(settings.encode("latin-1"))

    def outcome(find: Callable[[], str]) -> tuple[str, str]:
        try:
            return "endpoint", find()
        except AsyncsupError as error:
            return error.error_code, error.message

    expected = outcome(lambda: load_supervisor(file).endpoint)
    assert outcome(lambda: find_endpoint(file)) == expected


def test_the_configuration_is_looked_for_where_serve_looks(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from asyncsup.config import find_config, load_supervisor

    def check(name: str) -> None:
        expected = load_supervisor(find_config(None, os.environ)).endpoint
        assert find_endpoint() == expected
        assert f"/{name}/" in expected

    def write(path: Path, name: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'[supervisor]\nruntime_dir = "/run/{name}"\n')

    write(elsewhere / "home/.config/asyncsup/asyncsup.toml", "home")
    check("home")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    check("home")
    write(elsewhere / "xdg/asyncsup/asyncsup.toml", "xdg")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(elsewhere / "xdg"))
    check("xdg")
    (elsewhere / "cwd/asyncsup.toml").mkdir()  # a folder is no configuration
    check("xdg")
    (elsewhere / "cwd/asyncsup.toml").rmdir()
    write(elsewhere / "cwd/asyncsup.toml", "cwd")
    check("cwd")
    write(elsewhere / "named.toml", "named")
    monkeypatch.setenv("ASYNCSUP_CONFIG", str(elsewhere / "named.toml"))
    check("named")
    monkeypatch.setenv("ASYNCSUP_ENDPOINT", "ipc:///run/variable.sock")
    assert find_endpoint() == "ipc:///run/variable.sock"
    assert find_endpoint(elsewhere / "cwd/asyncsup.toml") == "ipc:///run/cwd/control.sock"


def test_no_configuration_says_where_it_was_looked_for(elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match=r"asyncsup init") as caught:
        find_endpoint()
    assert caught.value.error_code == "config.not_found"
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        find_endpoint(elsewhere / "missing.toml")


# --- the example --------------------------------------------------------------------------------------------


def test_the_bare_client_needs_nothing_of_asyncsup(serve: Serve) -> None:
    script = Path(__file__).parent.parent / "examples/bare_client.py"
    with serve.start('[target.idle]\ncommand = ["sleep", "1000"]\nmin_uptime = "0s"\n') as client:
        client.call("wait", {"names": ["idle"], "for": "ready"}, timeout=WAIT_SECONDS)
        child = subprocess.Popen(
            [sys.executable, "-u", script, serve.endpoint, "idle"], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = iter(child.stdout)
        assert next(lines).startswith("asyncsup 0.1.0, pid ")
        assert next(lines) == "idle is running at build 0\n"
        assert next(lines) == "restarted idle\n"
        heard: list[str] = []
        thread = threading.Thread(target=heard.extend, args=(lines,))
        thread.start()

        def has_heard_of_a_restart() -> bool:
            client.call("restart", names=["idle"], timeout=WAIT_SECONDS)
            return any("idle:0: stopped -> starting" in line or "-> stopping" in line for line in heard)

        # A subscription takes a moment to arrive.
        wait_for(has_heard_of_a_restart, "it to hear of a restart")
        client.call("shutdown")
        assert child.wait(WAIT_SECONDS) == 0
        thread.join()
        child.stdout.close()


def test_the_bare_client_says_what_the_supervisor_refused(serve: Serve) -> None:
    script = Path(__file__).parent.parent / "examples/bare_client.py"
    serve.start('[target.idle]\ncommand = ["sleep", "1000"]\n').close()
    done = subprocess.run(
        [sys.executable, script, serve.endpoint, "nope"],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "[target.not_found]" in done.stderr
