"""What once broke a running supervisor, or could: floods, odd files, dead ends, late messages."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, processes_of_this_run, wait_for
from test_patching import Field
from test_supervisor import QUICK, SLEEPER, instance, reached, target

from asyncsup.client import ControlClient, Event
from asyncsup.errors import AsyncsupError, RemoteError
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

HANGS = 60.0
"""What has not come by then never comes: everything here takes milliseconds on a machine that is idle."""


@pytest.fixture
def serve(short_tmp: Path) -> Iterator[Serve]:
    """A supervisor that is ended whatever state the test has brought it to."""
    server = Serve(short_tmp)
    yield server
    if server.process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.stop(timeout=20)
        server.process.wait(60)
    for line in processes_of_this_run():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)


@contextlib.contextmanager
def background(serve: Serve, method: str, /, **params: Any) -> Iterator[list[Any]]:
    """A request under way while the block runs; the list then holds its result or error."""
    outcome: list[Any] = []

    def call() -> None:
        with ControlClient(serve.endpoint) as other:
            try:
                outcome.append(other.call(method, params, timeout=2 * HANGS))
            except AsyncsupError as error:
                outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    yield outcome
    thread.join(1)


class EnoughError(Exception):
    """What was asked for has come as far as it is to come."""


def given_up(serve: Serve, method: str, is_enough: Callable[[Any], bool], /, **params: Any) -> None:
    """Ask for something, and give it up at an event."""

    def look(event: Event) -> None:
        if is_enough(event.data):
            raise EnoughError

    with ControlClient(serve.endpoint) as other, other.subscribe() as events, pytest.raises(EnoughError):
        other.call(method, params, events=events, on_event=look)


def answers(serve: Serve, method: str = "status", /, **params: Any) -> Any:
    """The answer, from a connection of its own; fails when there is none in time."""
    with ControlClient(serve.endpoint) as client:
        return client.call(method, params, timeout=HANGS)


def ends(serve: Serve) -> int:
    """SIGTERM ends the supervisor in time."""
    assert serve.process is not None
    serve.process.send_signal(signal.SIGTERM)
    try:
        return serve.process.wait(HANGS)
    except subprocess.TimeoutExpired:
        raise AssertionError("the supervisor does not end on SIGTERM") from None


def calm(serve: Serve) -> None:
    assert "Traceback" not in serve.errors(), serve.errors()[-3000:]


# --- the event loop is blocked for ever ---------------------------------------------------------------------


@pytest.mark.parametrize("kill_mode", ["group", "process"])
def test_a_grandchild_that_floods_while_its_leader_ends(serve: Serve, kill_mode: str) -> None:
    """`drain` never ends while somebody writes."""
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = ["sh", "-c", "yes & exec sleep 0.3"]\nkill_mode = "{kill_mode}"\n'
        'restart = "never"\nlog = { max_size = "1MB", max_files = 2, format = "timestamp" }\n'
    )
    client.close()
    # From running, or, where the flood kept the supervisor from noticing that, from starting.
    wait_for(lambda: " -> exited (exit status 0)" in serve.errors(), "the leader to have ended")
    answers(serve)


def test_a_target_that_floods_the_notify_socket(serve: Serve) -> None:
    """`NotifySocket._readable` never gives the loop its turn back."""
    (serve.folder / "flood.py").write_text(
        "import os, socket\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.connect(os.environ['NOTIFY_SOCKET'])\n"
        "s.send(b'READY=1')\n"
        "while not os.path.exists('stop'): s.send(b'STATUS=x')\n"
    )
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = ["{sys.executable}", "flood.py"]\nprotocol = "notify"\n'
        "instances = 4\n"
    )
    client.close()
    try:
        answers(serve)
        answers(serve, "stop", names=["web"])
    finally:
        (serve.folder / "stop").touch()


def test_a_log_path_that_is_a_pipe_nobody_reads(serve: Serve) -> None:
    os.mkfifo(serve.folder / "out.fifo")
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = ["sh", "-c", "echo hello; exec sleep 3600"]\n'
        f'log = {{ stdout = "{serve.folder}/out.fifo" }}\n'
    )
    client.close()
    wait_for(lambda: "web:0: stopped -> starting" in serve.errors(), "the start")
    try:
        answers(serve)
    finally:
        fd = os.open(serve.folder / "out.fifo", os.O_RDONLY | os.O_NONBLOCK)
        os.close(fd)


def test_a_checksum_file_that_is_a_pipe(field: Field) -> None:
    field.start("web")
    shutil.copy(field.package("web"), field.serve.inbox / "p.zip")
    os.mkfifo(field.serve.inbox / "p.zip.sha256")
    with background(field.serve, "patch.apply", name="p.zip"):
        try:
            for _ in range(10):  # the request arrives among these
                answers(field.serve)
        finally:
            with contextlib.suppress(OSError):
                os.close(os.open(field.serve.inbox / "p.zip.sha256", os.O_WRONLY | os.O_NONBLOCK))


# --- the supervisor crashes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["folder", "loop", "name"])
def test_something_odd_moved_into_the_inbox(serve: Serve, what: str) -> None:
    """An exception in `Inbox.watch` ends the supervisor, and its children are left to themselves."""
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    odd, arrived = serve.folder / "odd", serve.inbox / "x.zip"
    if what == "folder":
        odd.mkdir()
    elif what == "loop":
        odd.symlink_to("x.zip")
    else:
        odd.write_bytes(b"x")
        arrived = Path(os.fsdecode(os.fsencode(serve.inbox) + b"/\xff.zip"))
    odd.rename(arrived)
    (serve.inbox / "after.zip").write_bytes(b"x")
    wait_for(
        lambda: [e for e in client.call("events.since", seq=0)["events"] if e.get("file") == "after.zip"],
        "the next arrival to be noticed",
        timeout=HANGS,
    )
    client.close()
    calm(serve)


def test_a_pipe_moved_into_the_inbox(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    client.close()
    os.mkfifo(serve.folder / "odd")
    (serve.folder / "odd").rename(serve.inbox / "x.zip")
    try:
        wait_for(
            lambda: [e for e in answers(serve, "events.since", seq=0)["events"] if e.get("file") == "x.zip"],
            "the arrival to be noticed",
        )
        answers(serve, "patch.list")
    finally:
        with contextlib.suppress(OSError):
            os.close(os.open(serve.inbox / "x.zip", os.O_WRONLY | os.O_NONBLOCK))


def test_a_zip_that_vanishes_while_it_is_applied_automatically(field: Field) -> None:
    """`settle` raises FileNotFoundError out of `apply_arrivals`: the supervisor ends."""
    field.fail_at("overseer.settle:hang")
    field.start("web", patch="auto = true\n")
    package = field.package("web")
    shutil.copy(package, field.folder / "p.tmp")
    (field.folder / "p.tmp").rename(field.serve.inbox / "p.zip")
    field.said("web", "build=300 a.txt=new-a")
    (field.serve.inbox / "p.zip").unlink()
    field.fail_at("")
    wait_for(
        lambda: [
            e for e in answers(field.serve, "events.since", seq=0)["events"] if e["type"] == "patch.ended"
        ],
        "the end of the patch",
    )
    other = field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "newest"})
    shutil.copy(other, field.folder / "q.tmp")
    (field.folder / "q.tmp").rename(field.serve.inbox / "q.zip")
    field.said("web", "build=400")
    calm(field.serve)


def test_a_zip_that_vanishes_while_another_is_applied_automatically(field: Field) -> None:
    """`source` raises PatchNotFoundError out of `apply_arrivals`: the supervisor ends."""
    field.fail_at("overseer.settle:hang")
    field.start("web", patch="auto = true\n")
    first = field.package("web")
    second = field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "newest"})
    field.client.call("stop", names=["web"])
    field.client.close()
    field.serve.stop()
    shutil.copy(first, field.serve.inbox / "1.zip")
    shutil.copy(second, field.serve.inbox / "2.zip")
    field.client = field.serve.start()
    field.said("web", "build=300 a.txt=new-a")
    (field.serve.inbox / "2.zip").unlink()
    field.fail_at("")
    wait_for((field.serve.inbox / "applied/1.zip.json").exists, "the first to be settled")
    for _ in range(3):
        answers(field.serve)
    third = field.package("web", build=500, before={"a.txt": "new-a"}, files={"a.txt": "third"})
    shutil.copy(third, field.folder / "q.tmp")
    (field.folder / "q.tmp").rename(field.serve.inbox / "3.zip")
    field.said("web", "build=500")
    calm(field.serve)


# --- operations that never end ------------------------------------------------------------------------------

PAIR = f'{QUICK}[target.db]\n{SLEEPER}[target.web]\n{SLEEPER}depends_on = ["db"]\n'


def pair(serve: Serve) -> ControlClient:
    client = serve.start(PAIR)
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    client.call("stop", names=["db"])
    return client


@pytest.mark.parametrize("then", ["stop", "shutdown"])
def test_a_restart_given_up_while_a_dependency_is_down(serve: Serve, then: str) -> None:
    """`restart` puts its shield around `spawn_instances`, which waits for the dependency for ever."""
    client = pair(serve)
    with pytest.raises(RemoteError):
        client.call("restart", {"names": ["web"], "timeout": 0.3})
    client.close()
    if then == "stop":
        answers(serve, "stop", names=["web"])
    assert ends(serve) == 0


def cold_with_dependency_down(field: Field) -> Path:
    field.start("web", "db", each={"web": 'depends_on = ["db"]'})
    field.client.call("stop", names=["db"])
    return field.package("web", kind=Kind.COLD)


def test_a_cold_patch_of_a_target_whose_dependency_is_down(field: Field) -> None:
    """It ran without its dependency before, so it does not wait for it after."""
    report = field.apply(cold_with_dependency_down(field))
    assert report["verdict"] == "committed"
    field.said("web", "two build=300 a.txt=new-a")
    assert field.target("db")["state"] == "stopped"


def test_a_patch_behind_a_start_that_waits_for_what_the_patch_holds(field: Field) -> None:
    """`start db` waits for the patch, the patch for `start web`, `start web` for db."""
    field.start("db", "web", each={"web": 'depends_on = ["db"]'})
    field.client.call("stop", names=["web", "db"])
    package = field.package("db", "web")
    # As at boot with `autostart = false` for db: the start of web waits, db is not being started.
    field.client.close()
    field.serve.stop()
    field.serve.write(field.serve.config.read_text().replace('root = "db"', 'autostart = false\nroot = "db"'))
    field.client = field.serve.start()
    wait_for(lambda: field.target("web")["state"] == "waiting", "web to wait for db")
    with background(field.serve, "patch.apply", path=str(package)) as outcome:
        wait_for(lambda: field.target("db")["busy"] == "patch" or outcome, "the patch to have db")
        answers(field.serve, "start", names=["db"], timeout=HANGS - 20)
        field.client.call("wait", {"names": ["web"], "for": "ready", "timeout": HANGS})


@pytest.mark.parametrize("then", ["stop", "shutdown"])
def test_a_stop_does_not_wait_for_a_patch_that_waits_for_another_target(field: Field, then: str) -> None:
    """A patch over two targets waits in the queue of the one that is free as well."""
    field.start("a", "b", each={"a": 'depends_on = ["b"]'})
    with background(field.serve, "patch.apply", path=str(field.package("b", probation=10 * HANGS))):
        field.said("b", "build=300")
        with background(field.serve, "patch.apply", path=str(field.package("a", "b", build=400))):
            wait_for(lambda: field.target("a")["waiting"], "the second patch to queue on a")
            if then == "stop":
                answers(field.serve, "stop", names=["a"])
            else:
                assert ends(field.serve) == 0


# --- wrong in the end ---------------------------------------------------------------------------------------


def test_a_stop_of_one_instance_does_not_undo_a_stop_of_all(serve: Serve) -> None:
    (serve.folder / "deaf.sh").write_text(
        "trap '' TERM\ntouch deaf-$$\nuntil [ -e go ]; do sleep 0.1; done\n"
    )
    client = serve.start(f'{QUICK}[target.web]\ncommand = "sh deaf.sh"\ninstances = 3\nstop_timeout = "5m"\n')
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    wait_for(lambda: len(list(serve.folder.glob("deaf-*"))) == 3, "the programs not to listen")

    with background(serve, "stop", names=["web:0"]):
        wait_for(lambda: target(client, "web")["busy"] == "stop", "the first stop")
        with background(serve, "stop", names=["web"]) as everything:
            wait_for(lambda: target(client, "web")["waiting"], "the second stop to queue")
            with background(serve, "stop", names=["web:1"]) as last:
                wait_for(lambda: len(target(client, "web")["waiting"]) == 2, "the third stop to queue")
                (serve.folder / "go").touch()
                wait_for(lambda: everything and last, "both to be answered")
    for answer in (*everything, *last):
        assert not isinstance(answer, AsyncsupError), answer.message
    assert [i["state"] for i in target(client, "web")["instances"]] == ["stopped"] * 3
    client.close()


def test_a_start_right_after_a_stop_that_was_given_up(serve: Serve) -> None:
    # The first of them ends when it is told to.
    (serve.folder / "slow.sh").write_text(
        "[ -e deaf ] && exec sleep 3600\ntrap '' TERM\ntouch deaf\nuntil [ -e go ]; do sleep 0.1; done\n"
    )
    client = serve.start(f'{QUICK}[target.web]\ncommand = "sh slow.sh"\nstop_timeout = "5m"\n')
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    wait_for((serve.folder / "deaf").exists, "the program not to listen")
    given_up(serve, "stop", lambda event: event.get("to") == "stopping", names=["web"])
    wait_for(lambda: target(client, "web")["busy"] is None, "the stop to be given up")
    found = instance(client, "web")
    assert found["state"] == "stopping"
    with background(serve, "start", names=["web"], wait=False):
        wait_for(lambda: target(client, "web")["busy"] == "start", "the start")
        (serve.folder / "go").touch()
        wait_for(lambda: instance(client, "web")["pid"] not in {None, found["pid"]}, "the next process")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": HANGS})
    client.close()


def test_a_late_stop_command_does_not_hit_the_next_process(serve: Serve) -> None:
    (serve.folder / "stop.sh").write_text(
        "kill $MAINPID\nwhile ! [ -e go ]; do sleep 0.05; done\ntouch gone\nexit 1\n"
    )
    client = serve.start(f'{QUICK}[target.web]\n{SLEEPER}stop_command = "sh stop.sh"\nstop_timeout = "1m"\n')
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    client.call("restart", names=["web"])
    pid = instance(client, "web")["pid"]
    (serve.folder / "go").touch()
    wait_for((serve.folder / "gone").exists, "the end of the stop command")
    assert instance(client, "web")["pid"] == pid
    with pytest.raises(RemoteError):
        client.call("wait", {"names": ["web"], "for": "stopped", "timeout": 0.2})
    assert instance(client, "web")["restarts"] == 0
    client.close()


@pytest.mark.parametrize("stops", ["it", "the supervisor"])
def test_a_stop_command_that_hangs_does_not_outlive_the_stop(serve: Serve, stops: str) -> None:
    (serve.folder / "stop.sh").write_text("[ $1 = it ] || kill $MAINPID\nsleep 3333 &\n>asked\nwait\n")
    timeout = "1s" if stops == "it" else "1h"
    client = serve.start(
        f'{QUICK}[target.web]\n{SLEEPER}stop_command = ["sh", "stop.sh", "{stops}"]\n'
        f'stop_timeout = "{timeout}"\n'
    )
    reached(client, "web", "running")
    client.call("stop", names=["web"])
    client.close()
    if stops == "it":
        wait_for(lambda: "web:0: stop_command did not end in time" in serve.errors(), "the log to say so")
    else:
        wait_for((serve.folder / "asked").exists, "the stop command")
        serve.stop()
    wait_for(
        lambda: not any("stop.sh" in found or "sleep 3333" in found for found in processes_of_this_run()),
        "the end of the stop command",
    )


def test_what_crashes_during_a_reload_elsewhere_fails_the_patch(serve: Serve, field: Field) -> None:
    """Probation watches only who is ready when it begins: who fell before is not missed."""
    text = [
        '[supervisor]\nregion = "us-east-1"\n[patch]\ntrust = "none"\nprobation = "200ms"\n'
        'ack_timeout = "1m"\n[defaults]\nbuild = 200\nmin_uptime = "20ms"\n'
    ]
    for name in ("fast", "slow"):
        (field.folder / name).mkdir()
        for path, content in {"a.txt": "old-a", "b.txt": "old-b"}.items():
            (field.folder / name / path).write_text(content)
    gate = field.folder / "go"
    text.append(
        '[target.fast]\ncommand = "sleep 3600"\nroot = "fast"\nrestart = "never"\nreload_command = "true"\n'
    )
    text.append(
        '[target.slow]\ncommand = "sleep 3600"\nroot = "slow"\n'
        f'reload_command = ["sh", "-c", "while ! [ -e {gate} ]; do sleep 0.02; done"]\n'
    )
    field.client = serve.start("".join(text))
    field.client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    with field.applying(field.package("fast", "slow", files={"a.txt": "new-a"})) as outcome:
        wait_for(
            lambda: field.content("fast")["a.txt"] == "new-a" and field.instance("fast")["state"] == "running"
            and field.instance("slow")["state"] == "reloading", "fast to be done, slow not",
        )  # fmt: skip
        wait_for(
            lambda: [
                event
                for event in field.client.call("events.since", seq=0)["events"]
                if (event.get("step"), event.get("instance")) == ("reload", "fast:0")
            ],
            "the reload of fast",
        )
        os.kill(field.instance("fast")["pid"], signal.SIGKILL)
        wait_for(lambda: field.instance("fast")["state"] == "failed", "fast to have fallen")
        gate.touch()
    assert isinstance(outcome[0], AsyncsupError), outcome[0]["verdict"]
    assert field.content("fast")["a.txt"] == "old-a"


def test_who_respawned_on_the_new_files_is_told_of_the_way_back(field: Field) -> None:
    """An instance that crashed after the switch has started on the new files; it is left on them."""
    field.start("web", "slow", defaults='min_uptime = "10ms"\n[defaults.patch]\nack_timeout = "1m"')
    field.behave("slow", reload="never")
    with field.applying(field.package("web", "slow")) as outcome:
        before = field.said("web", "build=300 a.txt=new-a")
        wait_for(lambda: "reload" in field.steps(), "its answer")
        os.kill(before["pid"], signal.SIGKILL)
        wait_for(
            lambda: (
                (i := field.instance("web"))["pid"] not in {None, before["pid"]}
                and "new-a" in i["status_text"]
            ),
            "web on the new files again",
        )
        # It is this one's missing answer that ends the patch.
        os.kill(field.instance("slow")["pid"], signal.SIGKILL)
    assert isinstance(outcome[0], AsyncsupError)
    assert field.content("web")["a.txt"] == "old-a"
    field.said("web", "a.txt=old-a")


def test_a_running_target_is_told_even_if_a_stop_was_given_up(field: Field) -> None:
    """`wanted` is down at once, whatever becomes of the stop; a patch then passes by who still runs."""
    field.start("web", defaults="instances = 2")
    (field.folder / "web.work").mkdir(exist_ok=True)
    os.kill(field.target("web")["instances"][0]["pid"], signal.SIGSTOP)
    pid = field.target("web")["instances"][0]["pid"]
    # A stop of web:1 that takes a while keeps the queue; the stop of all behind it is given up.
    field.client.call("signal", names=["web:0"], signal="CONT")
    package = field.package("web", probation=30.0)
    field.behave("web", reload="")
    with field.applying(package):
        wait_for(
            lambda: all("build=300" in i["status_text"] for i in field.target("web")["instances"]), "300"
        )
        for each in field.target("web")["instances"]:
            os.kill(each["pid"], signal.SIGSTOP)  # the way back takes as long as ack_timeout
        given_up(field.serve, "stop", lambda event: event.get("step") == "undo", names=["web"])
        wait_for(lambda: not field.target("web")["waiting"], "the stop to be given up")
        for each in field.target("web")["instances"]:
            os.kill(each["pid"], signal.SIGCONT)
    found = field.target("web")
    assert found["instances"][0]["pid"] == pid
    field.client.call("wait", {"names": ["web"], "for": "ready", "timeout": HANGS})
    report = field.apply(field.package("web", build=400, files={"a.txt": "other"}))
    assert report["verdict"] == "committed"
    assert [i["reload"] for i in report["targets"][0]["instances"]] == ["ok", "ok"]
    field.said("web", "a.txt=other")


def test_a_start_that_was_given_up_goes_on_when_its_dependency_is_ready(serve: Serve) -> None:
    """`waiting` says: to be started as soon as its dependency is ready."""
    client = pair(serve)
    client.call("stop", names=["web"])
    slow = PAIR.replace("[target.db]\n", "[target.db]\nautostart = false\n")
    client.close()
    serve.stop()
    client = serve.start(slow)
    reached(client, "web", "waiting")
    assert target(client, "web")["busy"] is None
    client.call("start", names=["db"])
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": HANGS})
    client.close()


# --- swallowed or leaked ------------------------------------------------------------------------------------


def test_a_target_that_has_ended_costs_nothing(serve: Serve) -> None:
    """A FIFO whose last writer has gone is readable (end of file) for ever: 250 wake-ups a second each."""
    text = "".join(f'[target.t{n}]\ncommand = "true"\nrestart = "never"\n' for n in range(10))
    client = serve.start(f"{QUICK}{text}")
    for n in range(10):
        reached(client, f"t{n}", "exited")

    def switches() -> int:
        status = Path(f"/proc/{serve.supervisor}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("voluntary")))

    before = switches()
    time.sleep(1)
    assert switches() - before < 50
    client.close()


@pytest.mark.parametrize("value", ["²", "9" * 400])
def test_odd_numbers_in_a_notification_are_survived(serve: Serve, value: str) -> None:
    (serve.folder / "notifies.py").write_text(
        "import os, socket, time\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.connect(os.environ['NOTIFY_SOCKET'])\n"
        f"s.send('READY=1\\nEXTEND_TIMEOUT_USEC={value}'.encode())\n"
        "time.sleep(3600)\n"
    )
    client = serve.start(
        f'{QUICK}[target.unit]\ncommand = ["{sys.executable}", "notifies.py"]\nprotocol = "notify"\n'
        'start_timeout = "20s"\n'
    )
    client.call("wait", {"names": ["unit"], "for": "ready", "timeout": HANGS})
    client.close()
    calm(serve)


def test_an_env_file_with_a_nul_fails_the_start_and_not_the_supervisor(serve: Serve) -> None:
    """posix_spawn raises ValueError, the instance is `starting` for ever without a process."""
    (serve.folder / "env").write_bytes(b"A=x\0y\n")
    client = serve.start(f'{QUICK}[target.web]\n{SLEEPER}env_files = ["env"]\nstart_limit_burst = 1\n')
    reached(client, "web", "failed")
    client.call("stop", {"names": ["web"]}, timeout=HANGS)
    client.close()
    calm(serve)


def test_the_same_file_of_the_inbox_twice_at_once(field: Field) -> None:
    field.start("web")
    field.behave("web", prepare="wait")
    shutil.copy(field.package("web"), field.serve.inbox / "p.zip")
    with background(field.serve, "patch.apply", name="p.zip") as first:
        wait_for(lambda: field.target("web")["busy"] == "patch", "the first")
        with background(field.serve, "patch.apply", name="p.zip") as second:
            wait_for(lambda: field.target("web")["waiting"], "the second to wait")
            field.behave("web")
            wait_for(lambda: first and second, "both")
    assert first[0]["verdict"] == "committed"
    assert not isinstance(second[0], AsyncsupError), second[0].message
    calm(field.serve)


def test_a_newer_zip_of_the_same_name_is_not_filed_as_applied(field: Field) -> None:
    field.start("web")
    shutil.copy(field.package("web", probation=1.0), field.serve.inbox / "p.zip")
    newer = field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "newest"})
    with background(field.serve, "patch.apply", name="p.zip") as outcome:
        field.said("web", "build=300")
        shutil.copy(newer, field.folder / "tmp")
        (field.folder / "tmp").rename(field.serve.inbox / "p.zip")
        wait_for(lambda: outcome, "the end")
    assert outcome[0]["verdict"] == "committed"
    assert field.client.call("patch.apply", name="p.zip")["verdict"] == "committed"
    field.said("web", "build=400")


def test_a_file_with_an_odd_name_in_the_root(field: Field) -> None:
    field.start("web")
    Path(os.fsdecode(os.fsencode(field.folder / "web") + b"/\xff.log")).write_text("written by the program")
    report = field.apply(field.package("web"))
    assert report["verdict"] == "committed"
    calm(field.serve)


def test_the_history_of_a_cancelled_patch_has_its_steps(field: Field) -> None:
    field.start("web")
    package = str(field.package("web", probation=10 * HANGS))
    given_up(field.serve, "patch.apply", lambda event: event.get("step") == "reload", path=package)
    wait_for(lambda: field.target("web")["busy"] is None, "the way back")
    (entry,) = field.client.call("patch.history")["transactions"]
    assert entry["verdict"] == "rolled_back"
    assert [s["step"] for s in field.client.call("patch.show", id=str(entry["txn"]))["steps"]]


def test_a_script_that_gives_up_waits_as_well_until_everything_is_put_back(serve: Serve) -> None:
    (serve.folder / "app").mkdir()
    (serve.folder / "new").mkdir()
    (serve.folder / "new/a.txt").write_text("new")
    client = serve.start(
        f'{QUICK}[patch]\ntrust = "none"\nprobation = "5m"\n[target.web]\n{SLEEPER}root = "app"\n'
        'reload_command = ["sh", "-c", "sleep 1"]\n'
    )
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    build_patch(
        old=None, new=serve.folder / "new", output=serve.folder / "p.zip", name="p", version="1", build=1,
        kind=Kind.WARM, targets=["web"], regions=["local"],
    )  # fmt: skip
    asyncsup = [sys.executable, "-m", "asyncsup", "-c", str(serve.config)]
    given_up = [*asyncsup, "patch", "apply", str(serve.folder / "p.zip"), "--json", "--timeout", "4s"]

    def verdicts() -> list[str | None]:
        return [entry["verdict"] for entry in client.call("patch.history")["transactions"]]

    def has_waited() -> bool:
        ended = subprocess.run(given_up, check=False, capture_output=True, timeout=HANGS)
        assert ended.returncode == 124
        if b"waiting until the supervisor has put things back" in ended.stderr:
            return True
        # The machine was so busy that the time was over before there was anything to put back.
        wait_for(lambda: target(client, "web")["busy"] is None and None not in verdicts(), "the way back")
        return False

    wait_for(has_waited, "a patch that is given up under way", timeout=2 * HANGS)
    assert not {None, "switched_back"} & set(verdicts())
    assert not (serve.folder / "app/a.txt").exists()
    client.close()


def test_an_extension_after_the_start_time_out_does_not_save_it(serve: Serve) -> None:
    """While it is being ended for being late, EXTEND_TIMEOUT re-arms the start timer instead of SIGKILL."""
    (serve.folder / "late.py").write_text(
        "import os, signal, socket, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.connect(os.environ['NOTIFY_SOCKET'])\n"
        "time.sleep(0.6)\n"
        "while True: s.send(b'EXTEND_TIMEOUT_USEC=1000000'); time.sleep(0.2)\n"
    )
    client = serve.start(
        f'[target.unit]\ncommand = ["{sys.executable}", "late.py"]\nprotocol = "notify"\n'
        'start_timeout = "300ms"\nstop_timeout = "1s"\nrestart = "never"\n'
    )
    wait_for(lambda: instance(client, "unit")["state"] == "failed", "it to be killed", timeout=HANGS)
    client.close()


def test_essential_target_in_a_cold_patch_that_goes_wrong(field: Field) -> None:
    """The new program's death ends the supervisor instead of the patch."""
    field.start("web", each={"web": 'essential = true\nrestart = "never"'})
    package = field.package("web", kind=Kind.COLD)
    program = field.folder / f"new-{field._packages}" / "program.py"
    program.write_text("raise SystemExit(9)\n")
    from asyncsup.patch.build import build_patch

    build_patch(
        old=field.folder / f"old-{field._packages}", new=program.parent, output=package, name="broken",
        version="1", build=300, kind=Kind.COLD, targets=["web"], regions=["us-east-1"],
    )  # fmt: skip
    with pytest.raises(RemoteError) as caught:
        field.apply(package)
    assert caught.value.error_code == "patch.rolled_back"
    wait_for(lambda: "one build=200" in field.instance("web")["status_text"], "the old program")
    assert not answers(field.serve, "supervisor.info")["stopping"]
