"""`Target` against a supervisor on a real socket: the same program code in all the ways it can be entered."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from sdk_supervisor import (
    TOKEN,
    WAIT_SECONDS,
    SdkSupervisor,
    eventually,
    open_descriptors,
    prepare_params,
    reload_params,
    voluntary_switches,
)

from target_sdk import Patch, PrepareAnswer, Target, not_allowed, protocol, wait
from target_sdk.connection import CLOSE_GRACE, Connection
from target_sdk.dispatch import PendingDispatcher
from target_sdk.protocol import INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, Failure, Request, Result
from target_sdk.session import CallKey

Ask = Callable[[], Any]


@pytest.fixture
def stopped_supervisor(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> SdkSupervisor:
    fake = SdkSupervisor(short_tmp)
    for name, value in fake.environment().items():
        monkeypatch.setenv(name, value)
    return fake


@pytest.fixture
def supervisor(stopped_supervisor: SdkSupervisor, monkeypatch: pytest.MonkeyPatch) -> Iterator[SdkSupervisor]:
    # It lasts only until all was heard, which takes as long as this process is not let run.
    monkeypatch.setattr("target_sdk.connection.CLOSE_GRACE", WAIT_SECONDS / 4)
    with stopped_supervisor:
        yield stopped_supervisor


@pytest.fixture
def without_asyncsup(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ASYNCSUP_")]:
        monkeypatch.delenv(name)


def result_of(answer: Result | Failure) -> Any:
    assert isinstance(answer, Result), answer
    return answer.result


class Asking(threading.Thread):
    """Asks the supervisor's questions while the test's own thread is the program."""

    def __init__(self, ask: Ask) -> None:
        super().__init__(daemon=True)
        self._ask = ask
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._ask()
        except BaseException as error:
            self._error = error

    @property
    def value(self) -> Any:
        self.join(WAIT_SECONDS)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


def run_pending(target: Target, ask: Ask) -> Any:
    """Be a threaded program until the question is answered."""
    asking = Asking(ask)
    while asking.is_alive():
        target.run_pending(timeout=0.02)
    return asking.value


def in_loop(target: Target, ask: Ask) -> Any:
    """Be an asyncio program until the question is answered."""

    async def main() -> Any:
        async with target:
            asking = Asking(ask)
            while asking.is_alive():
                await asyncio.sleep(0.005)
            return asking.value

    return asyncio.run(main())


def in_thread(target: Target, ask: Ask) -> Any:
    with target:
        return ask()


def by_run_pending(target: Target, ask: Ask) -> Any:
    with target:
        return run_pending(target, ask)


# Each way to run handlers: how the target is made, and how a question reaches it.
WAYS: list[Any] = [
    pytest.param("program", by_run_pending, id="run_pending"),
    pytest.param("thread", in_thread, id="thread"),
    pytest.param("program", in_loop, id="asyncio"),
]


# --- reports ------------------------------------------------------------------------------------------------


def test_hello_comes_first_and_ready_follows_even_if_it_was_said_before_connecting(
    supervisor: SdkSupervisor,
) -> None:
    target = Target()
    target.ready()
    target.status("warming up")
    with target:
        supervisor.requests("status")
        target.ready()
        target.extend(7.5)
        supervisor.requests("extend")
    assert supervisor.methods()[:3] == ["hello", "ready", "status"]
    # A method that is said again waits for its own acknowledgement; others need not wait for it.
    assert sorted(supervisor.methods()[3:]) == ["extend", "ready", "stopping"]
    hello = protocol.Hello.from_params(supervisor.requests("hello")[0].params)
    assert (hello.pid, hello.name, hello.build, hello.region) == (os.getpid(), "pricer", 200, "us-east-1")
    assert hello.sdk.startswith("python/")
    assert supervisor.requests("ready")[0].params == {"build": 200}
    assert supervisor.requests("status")[0].params == {"text": "warming up"}
    assert supervisor.requests("extend")[0].params == {"seconds": 7.5}


def test_everything_that_still_holds_is_said_again_to_a_restarted_supervisor(
    supervisor: SdkSupervisor,
) -> None:
    with Target() as target:
        target.ready()
        target.status("working")
        supervisor.requests("status")
        supervisor.stop()
        target.status("still working")
        supervisor.start()
        supervisor.requests("status", 2)
        assert supervisor.methods() == ["hello", "ready", "status"] * 2
        assert supervisor.requests("status")[-1].params == {"text": "still working"}
        assert result_of(supervisor.call("ping")) == {}


def test_a_supervisor_that_is_not_there_yet_is_found_when_it_comes(
    stopped_supervisor: SdkSupervisor,
) -> None:
    with Target() as target:
        target.ready()
        time.sleep(0.05)
        with stopped_supervisor:
            stopped_supervisor.requests("ready")


def sockets_to(endpoint: str) -> set[str]:
    """Those of this process that are, or were, connected to it."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            name = str(entry.readlink())
            if name.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry.name))) as copy:
                    if copy.getpeername() == endpoint.removeprefix("ipc://"):
                        found.add(name)
    return found


def test_what_was_said_while_the_supervisor_went_away_never_comes_before_hello(
    supervisor: SdkSupervisor,
) -> None:
    asked, release = threading.Event(), threading.Event()

    def serve(key: CallKey, request: Request) -> Result:
        asked.set()
        assert release.wait(WAIT_SECONDS)  # the I/O thread cannot notice that the supervisor is gone
        return Result(id=key.id, result={})

    connection = Connection(
        supervisor.endpoint,
        hello=lambda: protocol.Hello(token=TOKEN, pid=1, sdk="test"),
        serve=serve,
        lost=lambda: None,
    )
    try:
        supervisor.send("drain")
        assert asked.wait(WAIT_SECONDS)
        connected = sockets_to(supervisor.endpoint)
        assert connected
        supervisor.stop()
        # libzmq's own thread notices, and closes the socket.
        eventually(lambda: connected.isdisjoint(sockets_to(supervisor.endpoint)), "the loss is noticed")
        connection.report("extend", lambda: {"seconds": 1}, lasting=False)
        release.set()
        supervisor.start()
        supervisor.requests("extend")
        assert supervisor.methods() == ["hello", "hello", "extend"]
    finally:
        release.set()
        connection.close()


def test_reports_without_acknowledgement_are_repeated_with_the_same_id(supervisor: SdkSupervisor) -> None:
    supervisor.acknowledge = False
    with Target() as target:
        target.ready()
        first, second = supervisor.requests("ready", 2)[:2]
        assert first == second
        supervisor.acknowledge = True


def test_a_refused_hello_silences_the_target_with_a_warning_and_the_program_goes_on(
    supervisor: SdkSupervisor, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.known_tokens = set()
    with caplog.at_level(logging.WARNING, "target_sdk"), Target() as target:
        target.ready()
        supervisor.requests("hello")
        eventually(lambda: "unknown token" in caplog.text, "the refusal is logged")
        target.status("going on")
    assert supervisor.methods() == ["hello"]


def test_nothing_wakes_up_while_nothing_happens(supervisor: SdkSupervisor) -> None:
    before = set(threading.enumerate())
    with Target() as target:
        target.ready()
        supervisor.requests("ready")
        (thread,) = [t for t in threading.enumerate() if t not in before and t.name == "target-sdk-io"]
        assert thread.native_id is not None
        result_of(supervisor.call("ping"))
        number = thread.native_id

        def sleeps() -> bool:
            before = voluntary_switches(number)
            time.sleep(1.0)
            return voluntary_switches(number) == before

        eventually(sleeps, "a second goes by in which it does not wake up")


def test_leaving_the_target_ends_its_threads_and_closes_what_it_opened(supervisor: SdkSupervisor) -> None:
    with Target(handlers="thread"):
        supervisor.requests("hello")
    gc.collect()
    fds, threads = open_descriptors(), set(threading.enumerate())
    for count in range(2, 5):
        with Target(handlers="thread"):
            supervisor.requests("hello", count)
        eventually(lambda: set(threading.enumerate()) <= threads, "the threads have ended")
    # The supervisor, which lives in this process as well, closes its ends a moment later.
    eventually(lambda: open_descriptors() <= fds, "all is closed")


def test_leaving_is_quick_when_the_supervisor_is_gone_or_does_not_answer(
    supervisor: SdkSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("target_sdk.connection.CLOSE_GRACE", CLOSE_GRACE)
    with Target():
        supervisor.requests("hello")
        supervisor.acknowledge = False
        started = time.monotonic()
    assert time.monotonic() - started < WAIT_SECONDS / 2
    assert supervisor.requests("stopping")


def test_text_of_any_kind_and_length_can_be_reported(supervisor: SdkSupervisor) -> None:
    with Target() as target:
        target.status("file \udcff.txt " + "x" * 3_000_000)
        (status,) = supervisor.requests("status")
        assert status.params["text"].startswith("file \\udcff.txt x")
        assert len(status.params["text"]) <= 2000


def test_a_failure_is_told_with_its_reason(supervisor: SdkSupervisor) -> None:
    with Target() as target:
        target.failed("no prices \udcff")
        (failed,) = supervisor.requests("failed")
        assert failed.params == {"reason": "no prices \\udcff"}
        target.failed("still none")
        assert supervisor.requests("failed", 2)[1].params == {"reason": "still none"}
    with_out = Target()  # Entered or not, managed or not, it never raises.
    with_out.failed("nobody listens")


def test_a_signal_handler_may_report_at_any_moment(supervisor: SdkSupervisor) -> None:
    handled = 0

    def handle(*_: object) -> None:
        nonlocal handled
        handled += 1
        target.status(f"signal {handled}")

    before = signal.signal(signal.SIGVTALRM, handle)
    try:
        with Target() as target:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
            while handled < 200:
                target.status("main")
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            target.status("done")
            eventually(lambda: supervisor.requests("status")[-1].params == {"text": "done"}, "all is said")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf, 100_000])
def test_extend_refuses_a_time_that_makes_no_sense(without_asyncsup: None, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        Target().extend(seconds)


# --- requests of the supervisor -----------------------------------------------------------------------------


def test_without_handlers_every_answer_is_yes(supervisor: SdkSupervisor) -> None:
    with Target() as target:
        supervisor.requests("hello")
        assert result_of(supervisor.call("prepare", prepare_params())) == {"verdict": "go_ahead"}
        assert target.build == 200
        assert result_of(supervisor.call("reload", reload_params(build=300))) == {
            "verdict": "ok",
            "took": 0.0,
        }
        assert target.build == 300
        assert result_of(supervisor.call("abort", {"patch": "p1"})) == {}
        assert result_of(supervisor.call("drain", {"deadline": 5})) == {}
        assert result_of(supervisor.call("ping")) == {}


@pytest.mark.parametrize(("handlers", "ask_in"), WAYS)
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, {"verdict": "go_ahead"}),
        (True, {"verdict": "go_ahead"}),
        (
            wait(2.0, "settling 3 orders"),
            {"verdict": "wait", "retry_after": 2.0, "reason": "settling 3 orders"},
        ),
        (wait(1), {"verdict": "wait", "retry_after": 1.0}),
        (not_allowed("market is open"), {"verdict": "not_allowed", "reason": "market is open"}),
        (False, {"verdict": "not_allowed", "reason": "the program said no"}),
        (
            "go_ahead",
            {"verdict": "not_allowed", "reason": "the program's prepare handler returned 'go_ahead'"},
        ),
        (ValueError("no idea"), {"verdict": "not_allowed", "reason": "ValueError: no idea"}),
    ],
    ids=repr,
)
def test_prepare_answers_what_the_handler_says(
    supervisor: SdkSupervisor,
    handlers: Any,
    ask_in: Callable[[Target, Ask], Any],
    answer: Any,
    expected: dict[str, Any],
) -> None:
    target = Target(handlers=handlers)
    asked: list[Patch] = []

    @target.on_prepare
    def prepare(patch: Patch) -> Any:
        asked.append(patch)
        if isinstance(answer, Exception):
            raise answer
        return answer

    got = ask_in(target, lambda: supervisor.call("prepare", prepare_params(patch="p9", build=301)))
    assert result_of(got) == expected
    (patch,) = asked
    assert patch == Patch(
        id="p9", build=301, changed=("job.json",), root=target.root, kind="warm", deadline=10.0
    )


@pytest.mark.parametrize(("handlers", "ask_in"), WAYS)
def test_reload_takes_the_build_up_only_if_the_handler_succeeds(
    supervisor: SdkSupervisor, handlers: Any, ask_in: Callable[[Target, Ask], Any]
) -> None:
    target = Target(handlers=handlers)
    seen: list[tuple[Patch, int | None]] = []

    @target.on_reload
    def reload(patch: Patch) -> None:
        seen.append((patch, target.build))
        if patch.build == 400:
            raise OSError(2, "no such file", "prices.json")

    def ask() -> list[Any]:
        good = result_of(supervisor.call("reload", reload_params(build=300, root="/srv/work")))
        bad = result_of(supervisor.call("reload", reload_params(patch="p2", build=400)))
        back = result_of(supervisor.call("reload", reload_params(patch="p2", build=300, rollback=True)))
        plain = result_of(supervisor.call("reload", reload_params(patch=None, build=300)))
        return [good, bad, back, plain]

    good, bad, back, plain = ask_in(target, ask)
    assert good["verdict"] == back["verdict"] == plain["verdict"] == "ok"
    assert good["took"] >= 0
    assert bad["verdict"] == "failed"
    assert bad["reason"] == "FileNotFoundError: [Errno 2] no such file: 'prices.json'"
    assert target.build == 300
    assert seen[0] == (Patch(id="p1", build=300, changed=("job.json",), root=Path("/srv/work")), 200)
    assert [build for _, build in seen] == [200, 300, 300, 300]
    assert [patch.rollback for patch, _ in seen] == [False, False, True, False]
    assert seen[3][0].id is None


def test_a_reload_handler_that_returns_false_has_failed(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")
    target.on_reload(lambda _: False)
    with target:
        answer = result_of(supervisor.call("reload", reload_params(build=300)))
    assert answer["verdict"] == "failed"
    assert target.build == 200


def test_hello_after_a_reload_and_a_reconnect_says_the_new_build(supervisor: SdkSupervisor) -> None:
    with Target() as target:
        target.ready()
        result_of(supervisor.call("reload", reload_params(build=300)))
        supervisor.stop()
        supervisor.start()
        assert supervisor.requests("hello", 2)[-1].params["build"] == 300
        assert supervisor.requests("ready", 2)[-1].params == {"build": 300}


@pytest.mark.parametrize(("handlers", "ask_in"), WAYS)
def test_repeated_requests_run_the_handler_once_and_get_one_answer_each_time_it_is_done(
    supervisor: SdkSupervisor, handlers: Any, ask_in: Callable[[Target, Ask], Any]
) -> None:
    target = Target(handlers=handlers)
    runs: list[int] = []
    asked_thrice = threading.Event()

    @target.on_reload
    def reload(patch: Patch) -> None:
        runs.append(patch.build)
        assert asked_thrice.wait(WAIT_SECONDS)

    def ask() -> None:
        for _ in range(3):
            supervisor.send("reload", reload_params(), id="r1")
        supervisor.call("ping")  # answered when all before it have arrived
        asked_thrice.set()
        first = supervisor.answers("r1", 1)
        result_of(supervisor.call("ping"))
        assert len(supervisor.answers("r1", 1)) == 1, "a repeat of what is in progress was answered"
        supervisor.send("reload", reload_params(), id="r1")
        assert supervisor.answers("r1", 2) == first * 2

    ask_in(target, ask)
    assert runs == [300]


def test_handlers_run_one_at_a_time_and_in_order(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")
    log: list[str] = []

    @target.on_prepare
    def prepare(patch: Patch) -> None:
        log.append(f"+{patch.id}")
        time.sleep(0.01)
        log.append(f"-{patch.id}")

    with target:
        ids = [supervisor.send("prepare", prepare_params(patch=f"p{i}")) for i in range(5)]
        for request_id in ids:
            supervisor.answers(request_id, 1)
    assert log == [f"{sign}p{i}" for i in range(5) for sign in "+-"]


def test_reports_are_sent_while_a_handler_runs(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")

    @target.on_reload
    def reload(patch: Patch) -> None:
        target.extend(30)
        supervisor.requests("extend")

    with target:
        assert result_of(supervisor.call("reload", reload_params()))["verdict"] == "ok"


def test_abort_is_told_once_and_only_about_a_patch_that_was_prepared(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")
    aborted: list[Patch] = []
    target.on_abort(aborted.append)
    with target:
        supervisor.call("prepare", prepare_params(patch="p1", build=300))
        for patch in ("p0", "p1", "p1"):
            assert result_of(supervisor.call("abort", {"patch": patch})) == {}
        supervisor.call("prepare", prepare_params(patch="p2", build=301))
        supervisor.call("reload", reload_params(patch="p2"))
        assert result_of(supervisor.call("abort", {"patch": "p2"})) == {}
    assert [(patch.id, patch.build) for patch in aborted] == [("p1", 300)]


@pytest.mark.parametrize("settled_by", [None, "abort", "reload"])
def test_a_program_that_paused_for_a_patch_is_told_when_the_supervisor_goes_away(
    supervisor: SdkSupervisor, settled_by: str | None
) -> None:
    target = Target(handlers="thread")
    aborted: list[str | None] = []
    target.on_abort(lambda patch: aborted.append(patch.id))
    with target:
        supervisor.call("prepare", prepare_params(patch="p1"))
        if settled_by == "abort":
            supervisor.call("abort", {"patch": "p1"})
        elif settled_by == "reload":
            supervisor.call("reload", reload_params(patch="p1"))
        supervisor.stop()
        if settled_by is None:
            eventually(lambda: aborted, "the handler is called")
        supervisor.start()
        supervisor.requests("hello", 2)
        assert result_of(supervisor.call("abort", {"patch": "p1"})) == {}
    assert aborted == ([] if settled_by == "reload" else ["p1"])


def test_drain_is_given_its_seconds_and_an_error_in_it_is_an_error(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")
    given: list[float] = []

    @target.on_drain
    def drain(deadline: float) -> None:
        given.append(deadline)
        if deadline < 1:
            raise RuntimeError("too short")

    with target:
        assert result_of(supervisor.call("drain", {"deadline": 5})) == {}
        answer = supervisor.call("drain", {"deadline": 0.5})
    assert answer == Failure(id=answer.id, number=INTERNAL_ERROR, message="RuntimeError: too short")
    assert given == [5.0, 0.5]


def test_unknown_methods_and_wrong_parameters_are_answered_with_json_rpc_errors(
    supervisor: SdkSupervisor,
) -> None:
    with Target():
        unknown = supervisor.call("explode")
        wrong = supervisor.call("reload", {"build": "300"})
        undrained = supervisor.call("drain", {"deadline": True})
        assert isinstance(unknown, Failure)
        assert isinstance(wrong, Failure)
        assert isinstance(undrained, Failure)
        assert unknown.number == METHOD_NOT_FOUND
        assert wrong.number == undrained.number == INVALID_PARAMS
        assert "build must be an integer" in wrong.message or "root must be" in wrong.message


def test_garbage_frames_are_dropped(supervisor: SdkSupervisor) -> None:
    with Target() as target:
        supervisor.requests("hello")
        for frame in (
            b"",
            os.urandom(300),
            b"{",
            b"[]",
            b'{"jsonrpc":"2.0"}',
            b'{"jsonrpc":"2.0","method":"reload","params":{}}',
            b'{"jsonrpc":"2.0","id":99,"result":{}}',
            b'{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"?"}}',
        ):
            supervisor.send_frames(frame)
        ping = b'{"jsonrpc":"2.0","id":"in two frames","method":"ping"}'
        supervisor.send_frames(b"", ping)
        supervisor.send_frames(ping, b"")
        target.ready()
        assert result_of(supervisor.call("ping")) == {}
        supervisor.requests("ready")
        assert supervisor.answers("in two frames", 0) == []
    assert supervisor.methods() == ["hello", "ready", "stopping"]


def test_reasons_are_fit_to_be_sent_whatever_the_exception_says(
    supervisor: SdkSupervisor, caplog: pytest.LogCaptureFixture
) -> None:
    # What is logged of it is not UTF-8, and test processes send one another what was captured.
    caplog.set_level(logging.CRITICAL + 1, logger="target_sdk")
    target = Target(handlers="thread")

    class UnprintableError(Exception):
        def __str__(self) -> str:
            return "bad name \udcff " + "x" * 2_000_000

    @target.on_reload
    def reload(patch: Patch) -> None:
        raise UnprintableError

    with target:
        answer = result_of(supervisor.call("reload", reload_params()))
    assert answer["reason"].startswith("UnprintableError: bad name \\udcff x")
    assert len(answer["reason"]) <= 2000


@pytest.mark.parametrize(("handlers", "ask_in"), WAYS[:2])
def test_a_program_that_leaves_answers_whoever_waits_for_it(
    supervisor: SdkSupervisor, handlers: Any, ask_in: Callable[[Target, Ask], Any]
) -> None:
    target = Target(handlers=handlers)
    begun, release = threading.Event(), threading.Event()

    @target.on_reload
    def reload(patch: Patch) -> None:
        begun.set()
        assert release.wait(WAIT_SECONDS)

    with target:
        supervisor.send("reload", reload_params(), id="running")
        supervisor.send("reload", reload_params(patch="p2"), id="waiting")
        supervisor.call("ping")
        if handlers == "thread":
            assert begun.wait(WAIT_SECONDS)
            threading.Timer(0.1, release.set).start()
    waiting = result_of(supervisor.answers("waiting", 1)[0])
    running = result_of(supervisor.answers("running", 1)[0])
    assert (waiting["verdict"], waiting["reason"]) == ("failed", "the program is stopping")
    assert running["verdict"] == ("ok" if handlers == "thread" else "failed")


# --- where handlers run -------------------------------------------------------------------------------------


def test_run_pending_runs_handlers_in_the_thread_that_calls_it(supervisor: SdkSupervisor) -> None:
    target = Target()
    threads: list[threading.Thread] = []
    target.on_prepare(lambda _: threads.append(threading.current_thread()))
    with target:
        assert target.run_pending() == 0
        asking = Asking(lambda: supervisor.call("prepare", prepare_params()))
        assert target.run_pending(timeout=WAIT_SECONDS) == 1
        assert result_of(asking.value) == {"verdict": "go_ahead"}
    assert threads == [threading.current_thread()]


def test_leaving_wakes_up_whoever_waits_in_run_pending_and_nobody_spins_afterwards(
    supervisor: SdkSupervisor,
) -> None:
    with Target() as target:
        waiting = Asking(lambda: target.run_pending(timeout=None))
        supervisor.requests("hello")
        pending = target._dispatcher
        assert isinstance(pending, PendingDispatcher)
        eventually(lambda: pending._last_run is not None, "it waits")
        assert waiting.is_alive()
    assert waiting.value == 0
    started = time.monotonic()
    assert target.run_pending(timeout=0.05) == 0
    assert time.monotonic() - started >= 0.05


def test_a_request_that_nobody_will_ever_run_is_warned_about(
    supervisor: SdkSupervisor, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target()
    target.on_prepare(lambda _: None)
    with caplog.at_level(logging.WARNING, "target_sdk"), target:
        supervisor.send("prepare", prepare_params())
        eventually(lambda: "run_pending() was never called" in caplog.text, "the warning is logged")


def test_run_pending_from_within_a_handler_is_an_error_and_no_deadlock(supervisor: SdkSupervisor) -> None:
    target = Target()

    @target.on_reload
    def reload(patch: Patch) -> None:
        target.run_pending()

    answer = by_run_pending(target, lambda: supervisor.call("reload", reload_params()))
    assert "within a handler" in result_of(answer)["reason"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ending_the_program_in_a_handler_answers_first(
    supervisor: SdkSupervisor, error: type[BaseException]
) -> None:
    target = Target()

    @target.on_reload
    def reload(patch: Patch) -> None:
        raise error

    with pytest.raises(error), target:
        supervisor.send("reload", reload_params(), id="r")
        while True:
            target.run_pending(timeout=1.0)
    assert result_of(supervisor.answers("r", 1)[0])["verdict"] == "failed"


def test_a_handler_thread_survives_an_exit_in_a_handler(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")

    @target.on_reload
    def reload(patch: Patch) -> None:
        raise SystemExit(3)

    with target:
        assert result_of(supervisor.call("reload", reload_params()))["reason"] == "SystemExit: 3"
        assert result_of(supervisor.call("reload", reload_params(build=301)))["verdict"] == "failed"


def test_async_handlers_run_on_the_loop_one_at_a_time(supervisor: SdkSupervisor) -> None:
    target = Target()
    log: list[str] = []
    loops: set[asyncio.AbstractEventLoop] = set()

    @target.on_prepare
    async def prepare(patch: Patch) -> PrepareAnswer | None:
        loops.add(asyncio.get_running_loop())
        log.append(f"+{patch.id}")
        await asyncio.sleep(0.01)
        log.append(f"-{patch.id}")
        return None if patch.id == "p0" else wait(1.0, "again")

    async def main() -> None:
        async with target:
            loop = asyncio.get_running_loop()
            ids = [supervisor.send("prepare", prepare_params(patch=f"p{i}")) for i in range(3)]
            answers = await asyncio.to_thread(lambda: [supervisor.answers(i, 1)[0] for i in ids])
            assert [result_of(a)["verdict"] for a in answers] == ["go_ahead", "wait", "wait"]
            assert loops == {loop}

    asyncio.run(main())
    assert log == ["+p0", "-p0", "+p1", "-p1", "+p2", "-p2"]


def test_the_target_works_under_anyio_with_anyios_own_tools_in_handlers(supervisor: SdkSupervisor) -> None:
    target = Target()

    @target.on_reload
    async def reload(patch: Patch) -> None:
        if patch.build == 302:
            with anyio.fail_after(0.01):
                await anyio.sleep_forever()
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)

    async def main() -> None:
        async with anyio.create_task_group() as group, target:
            group.start_soon(anyio.sleep_forever)
            target.ready()
            good = await anyio.to_thread.run_sync(supervisor.call, "reload", reload_params(build=301))
            late = await anyio.to_thread.run_sync(supervisor.call, "reload", reload_params(build=302))
            assert result_of(good)["verdict"] == "ok"
            assert result_of(late)["reason"] == "TimeoutError"
            group.cancel_scope.cancel()

    anyio.run(main)
    assert supervisor.methods() == ["hello", "ready", "stopping"]
    assert target.build == 301


def test_cancelling_the_program_cancels_the_handler_and_answers_for_it(supervisor: SdkSupervisor) -> None:
    target = Target()
    begun = asyncio.Event()
    ended: list[str] = []

    @target.on_reload
    async def reload(patch: Patch) -> None:
        begun.set()
        try:
            await asyncio.sleep(WAIT_SECONDS)
        finally:
            ended.append("cleaned up")

    async def main() -> None:
        async with target:
            supervisor.send("reload", reload_params(), id="r1")
            supervisor.send("reload", reload_params(build=301), id="r2")
            await asyncio.to_thread(supervisor.call, "ping")
            await begun.wait()

    asyncio.run(main())
    assert ended == ["cleaned up"]
    for request_id in ("r1", "r2"):
        assert result_of(supervisor.answers(request_id, 1)[0])["reason"] == "the program is stopping"


def test_a_handler_that_awaits_something_cancelled_fails_and_the_next_one_runs(
    supervisor: SdkSupervisor,
) -> None:
    target = Target()

    @target.on_reload
    async def reload(patch: Patch) -> None:
        if patch.build == 300:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    def ask() -> None:
        assert result_of(supervisor.call("reload", reload_params()))["reason"] == "CancelledError"
        assert result_of(supervisor.call("reload", reload_params(build=301)))["verdict"] == "ok"

    in_loop(target, ask)


def test_handlers_in_a_thread_leave_the_loop_of_an_asyncio_program_alone(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")
    threads: list[str] = []
    target.on_reload(lambda _: threads.append(threading.current_thread().name))
    assert result_of(in_loop(target, lambda: supervisor.call("reload", reload_params())))["verdict"] == "ok"
    assert threads == ["target-sdk-handlers"]


# --- hard to misuse -----------------------------------------------------------------------------------------


def enter(target: Target) -> None:
    """`async with target` where no loop of asyncio runs, as under trio."""
    entering: Coroutine[Any, Any, Target] = target.__aenter__()
    entering.send(None)


def _sync(_: Patch) -> None: ...
async def _async(_: Patch) -> None: ...


class _AsyncCallable:
    async def __call__(self, patch: Patch) -> None: ...


@pytest.mark.parametrize("handler", [_async, functools.partial(_async), _AsyncCallable()])
def test_async_handlers_are_refused_where_no_loop_would_run_them(
    without_asyncsup: None, handler: Any
) -> None:
    target = Target()
    target.on_reload(handler)
    with pytest.raises(TypeError, match="async with"):
        target.__enter__()
    in_a_thread = Target(handlers="thread")
    in_a_thread.on_reload(handler)
    with pytest.raises(TypeError, match='handlers="thread"'):
        enter(in_a_thread)


def test_a_coroutine_from_a_handler_that_looked_synchronous_is_a_failure(supervisor: SdkSupervisor) -> None:
    target = Target(handlers="thread")
    target.on_reload(lambda patch: _async(patch))  # noqa: PLW0108 - hides that it is async
    with target:
        assert "async with" in result_of(supervisor.call("reload", reload_params()))["reason"]


@pytest.mark.parametrize("handler", [lambda: None, lambda a, b: None, lambda *, patch: None])
def test_a_handler_that_cannot_be_called_is_refused_when_it_is_registered(
    without_asyncsup: None, handler: Any
) -> None:
    target = Target()
    for register in (target.on_prepare, target.on_reload, target.on_abort, target.on_drain):
        with pytest.raises(TypeError, match="one argument"):
            register(handler)


def test_handlers_that_take_more_or_are_written_in_c_are_fine(without_asyncsup: None) -> None:
    target = Target()
    target.on_prepare(lambda patch, extra=1, **more: None)
    collected: list[Patch] = []
    assert target.on_reload(collected.append) == collected.append


def test_a_second_handler_or_a_late_one_is_refused(without_asyncsup: None) -> None:
    target = Target()
    target.on_reload(_sync)
    with pytest.raises(RuntimeError, match="there is a handler already"):
        target.on_reload(_sync)
    with target, pytest.raises(RuntimeError, match="before the target is entered"):
        target.on_prepare(_sync)


def test_with_in_an_asyncio_program_is_refused(without_asyncsup: None) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="async with"), Target():
            pass

    asyncio.run(main())


def test_async_with_outside_of_asyncio_is_refused(without_asyncsup: None) -> None:
    with pytest.raises(RuntimeError, match="needs asyncio"):
        enter(Target())


def test_a_target_is_entered_once(without_asyncsup: None) -> None:
    target = Target()
    with target:
        pass
    with pytest.raises(RuntimeError, match="entered once"), target:
        pass


def test_a_second_target_in_the_same_process_is_refused_while_the_first_is_entered(
    supervisor: SdkSupervisor,
) -> None:
    with Target():
        supervisor.requests("hello")
        with pytest.raises(RuntimeError, match="one per process"):
            Target().__enter__()
    with Target():
        supervisor.requests("hello", 2)


def test_run_pending_where_it_has_no_meaning_is_refused(without_asyncsup: None) -> None:
    with pytest.raises(RuntimeError, match="run_pending"):
        Target().run_pending()
    with Target(handlers="thread") as target, pytest.raises(RuntimeError, match="run_pending"):
        target.run_pending()


@pytest.mark.parametrize("retry_after", [math.nan, math.inf, -math.inf])
def test_wait_needs_a_time(retry_after: float) -> None:
    with pytest.raises(ValueError, match="retry_after"):
        wait(retry_after)


@pytest.mark.parametrize("retry_after", [0, -3, 1e-9])
def test_wait_never_asks_for_a_busy_loop(retry_after: float) -> None:
    answer = wait(retry_after)
    assert answer.retry_after is not None
    assert answer.retry_after >= 0.01


def test_an_unknown_place_for_handlers_is_refused() -> None:
    with pytest.raises(ValueError, match="handlers"):
        Target(handlers="loop")  # type: ignore[arg-type]


# --- what is known, and standing alone ----------------------------------------------------------------------


def test_what_the_supervisor_said_is_known_before_connecting(
    supervisor: SdkSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(protocol.ENV_ROOT, "/srv/work")
    target = Target(build=100, root="/elsewhere")
    assert target.managed
    assert (target.name, target.instance, target.region) == ("pricer", "pricer:0", "us-east-1")
    assert target.root == Path("/srv/work")
    assert target.build == 200, "the supervisor knows which patches came after the program's own build"


@pytest.mark.parametrize("value", ["0", "", "many", "-5"])
def test_the_programs_build_counts_where_the_supervisor_knows_none(
    supervisor: SdkSupervisor, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(protocol.ENV_BUILD, value)
    with Target(build=250):
        assert supervisor.requests("hello")[0].params["build"] == 250


def test_without_asyncsup_everything_is_a_quiet_no_op(
    without_asyncsup: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = set(threading.enumerate())
    with caplog.at_level(logging.DEBUG, "target_sdk"):
        target = Target(build=7, root=tmp_path)
        target.on_prepare(_sync)
        target.ready()
        with target:
            target.ready()
            target.status("text")
            target.extend(5)
            assert target.run_pending() == 0
            started = time.monotonic()
            assert target.run_pending(timeout=0.05) == 0
            assert time.monotonic() - started >= 0.05, "a program that sleeps here must not spin"
            target.stopping()
            assert set(threading.enumerate()) == threads
        with Target(handlers="thread"):
            assert set(threading.enumerate()) == threads

        async def main() -> None:
            async with Target() as alone:
                alone.ready()
                assert len(asyncio.all_tasks()) == 1

        asyncio.run(main())
    assert not caplog.records
    assert not target.managed
    assert (target.build, target.root, target.region, target.instance) == (7, tmp_path, None, None)
    assert target.name


def test_an_endpoint_that_makes_no_sense_is_a_warning_and_no_crash(
    supervisor: SdkSupervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(protocol.ENV_ENDPOINT, "nonsense")
    with caplog.at_level(logging.WARNING, "target_sdk"), Target() as target:
        target.ready()
        eventually(lambda: "cannot talk to the supervisor" in caplog.text, "the warning is logged")
        target.status("going on")
