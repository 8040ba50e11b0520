"""The sd_notify protocol, field by field: programs that say it over the real socket, and what comes of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, alive, wait_for
from test_supervisor import QUICK, SLEEPER, fails, instance, reached

from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError
from asyncsup.notification import (
    DATAGRAM_BYTES,
    BadNotificationError,
    Notification,
    ReloadHandshake,
    read_notification,
)
from asyncsup.notify import NotifySocket
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

PUPPET = """
import array, os, signal, socket, sys, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
def say(text, *fds):
    data = text if isinstance(text, bytes) else text.encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    s.sendmsg([data], rights, 0, os.environ["NOTIFY_SOCKET"])
def barrier():
    r, w = os.pipe()
    say("BARRIER=1", w)
    os.close(w)
    os.read(r, 1)
    os.close(r)
def now(): return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
def fork(work, *, session=False):
    pid = os.fork()
    if pid == 0:
        if session: os.setsid()
        work()
        os._exit(0)
    while session and os.getsid(pid) != pid: time.sleep(0.001)
    return pid
def forever():
    while True: time.sleep(3600)
def passed(): return int(os.environ.get("LISTEN_FDS", 0))
strings = open("strings", "r+b", buffering=0)
exec(os.environ.get("AT_START", "say('READY=1')"))
while True:
    line = b""
    while not line.endswith(b"\\n"):
        line += strings.read(1)
    number, _, line = line.partition(b" ")
    exec(line)
    barrier()
    with open("pulled", "a") as pulled: pulled.write(number.decode() + "\\n")
"""
"""Does what the lines say that are written to the FIFO ``strings``, one after the other."""


class Puppet:
    """A program that says whatever the test wants, under a real supervisor."""

    def __init__(self, serve: Serve, settings: str = "", *, more: str = "", at_start: str = "") -> None:
        self.serve = serve
        (serve.folder / "puppet.py").write_text(PUPPET)
        os.mkfifo(serve.folder / "strings")
        self._pulls = itertools.count(1)
        at_start = f"env.AT_START = '''{at_start}'''\n" if at_start else ""
        self.client: ControlClient = serve.start(
            f'{QUICK}[target.unit]\ncommand = ["{sys.executable}", "-S", "puppet.py"]\nprotocol = "notify"\n'
            f"{at_start}{settings}{more}"
        )

    def pull(self, line: str, *, wait: bool = True) -> None:
        """Have the program do something, and the supervisor hear of it."""
        done = self.serve.folder / "pulled"
        number = str(next(self._pulls))
        # Open for reading as well: it must not fail while there is no program, nor end for it.
        fd = os.open(self.serve.folder / "strings", os.O_RDWR)
        os.write(fd, f"{number} {line}\n".encode())
        if wait:
            wait_for(
                lambda: done.exists() and number in done.read_text().split(), f"the program to do {line}"
            )
        os.close(fd)

    def say(self, text: str, *descriptors: str) -> None:
        self.pull(f"say({', '.join([repr(text), *descriptors])})")

    def ask(self, expression: str) -> str:
        """The value of an expression in the program."""
        answer = self.serve.folder / "answer"
        self.pull(f"open({str(answer)!r}, 'w').write(str({expression}))")
        return answer.read_text()

    @property
    def now(self) -> Any:
        return instance(self.client, "unit")

    def reached(self, state: str) -> Any:
        return reached(self.client, "unit", state)

    def kill_supervisor(self) -> None:
        """Have another one take over."""
        self.client.close()
        self.serve.kill_supervisor()
        self.client = self.serve.connect()

    def counter(self, name: str) -> int:
        return int(self.client.call("supervisor.info")["counters"].get(f"notify.{name}", 0))

    def restarted(self, before: Any) -> Any:
        """It runs again, as another process."""

        def again() -> Any:
            found = self.now
            return (
                found if found["state"] == "running" and found["pid"] not in {before["pid"], None} else None
            )

        return wait_for(again, "another process")


def nothing_of_memory(pid: int) -> bool:
    return not [name for name in open_files(pid) if "memfd:m " in name]


Make = Callable[..., Puppet]


@pytest.fixture
def make(serve: Serve) -> Iterator[Make]:
    made: list[Puppet] = []

    def make_one(settings: str = "", **more: str) -> Puppet:
        made.append(Puppet(serve, settings, **more))
        return made[-1]

    yield make_one
    for puppet in made:
        puppet.client.close()


def open_files(pid: int) -> list[str]:
    """Some are open for a moment only."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


# --- the datagram -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("READY=1", Notification(state="ready")),
        ("READY=0", Notification()),
        ("READY=1\nSTOPPING=1\nRELOADING=1", Notification(state="stopping")),
        ("READY=1\nRELOADING=1\nMONOTONIC_USEC=12", Notification(state="reloading", reloading_at=12)),
        ("STATUS=a=b\nSTATUS=c", Notification(status="a=b")),
        ("STATUS=", Notification(status="")),
        ("ERRNO=2", Notification(error="ENOENT (No such file or directory)")),
        ("ERRNO=0", Notification(error="")),
        ("BUSERROR=org.x.Bad", Notification(error="org.x.Bad")),
        ("ERRNO=13\nBUSERROR=org.x.Bad", Notification(error="EACCES (Permission denied), org.x.Bad")),
        ("ERRNO=4096", Notification(unreadable=("ERRNO",))),
        ("BUSERROR=no dots", Notification(unreadable=("BUSERROR",))),
        ("MAINPID=77", Notification(main_pid=77)),
        ("MAINPID=1", Notification(unreadable=("MAINPID",))),
        ("MAINPID=-5", Notification(unreadable=("MAINPID",))),
        ("MAINPID=99999999999", Notification(unreadable=("MAINPID",))),
        ("WATCHDOG=1", Notification(watchdog="alive")),
        ("WATCHDOG=trigger", Notification(watchdog="trigger")),
        ("WATCHDOG=2", Notification(unreadable=("WATCHDOG",))),
        ("WATCHDOG_USEC=1500000", Notification(watchdog_timeout=1.5)),
        ("WATCHDOG_USEC=0", Notification(watchdog_timeout=0)),
        ("EXTEND_TIMEOUT_USEC=2000000", Notification(extend=2.0)),
        ("EXTEND_TIMEOUT_USEC=\N{SUPERSCRIPT TWO}", Notification(unreadable=("EXTEND_TIMEOUT_USEC",))),
        ("FDSTORE=1\nFDNAME=a b\nFDPOLL=0", Notification(fd_store=True, fd_name="a b", fd_poll=False)),
        ("FDSTOREREMOVE=1\nFDNAME=a:b", Notification(fd_remove=True, unreadable=("FDNAME",))),
        ("BARRIER=1", Notification(barrier=True)),
        ("X_OURS=1\nREADY=1\nno assignment\n=x\n", Notification(state="ready")),
        ("READY=1\0", Notification(state="ready")),
    ],
)
def test_what_a_datagram_says(text: str, expected: Notification) -> None:
    assert read_notification(text.encode()) == expected


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"nonsense", b"\xff\xfe", b"READY=1\0\nX=1", b"BARRIER=1\nREADY=1"]
)
def test_what_is_no_notification(data: bytes) -> None:
    with pytest.raises(BadNotificationError):
        read_notification(data)


def test_the_ready_of_an_earlier_reload_does_not_end_this_one() -> None:
    handshake = ReloadHandshake(100, says_when=False)
    handshake.said_reloading(99)
    assert not handshake.is_done_by_ready()
    handshake.said_reloading(100)
    assert handshake.is_done_by_ready()


def test_a_program_that_does_not_say_when_is_taken_at_its_word() -> None:
    assert ReloadHandshake(100, says_when=False).is_done_by_ready()
    handshake = ReloadHandshake(100, says_when=True)
    assert not handshake.is_done_by_ready()
    handshake.said_reloading(None)
    assert handshake.is_done_by_ready()


# --- what does not count ------------------------------------------------------------------------------------


def test_what_does_not_count_is_counted_and_said_once(make: Make, serve: Serve) -> None:
    puppet = make()
    puppet.reached("running")
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stranger.connect(serve.endpoint.removeprefix("ipc://").replace("control", "notify"))
    reader, writer = os.pipe()
    for _ in range(3):
        socket.send_fds(stranger, [b"STATUS=mine"], [writer])
        stranger.send(b"x" * (DATAGRAM_BYTES + 1))
        stranger.send(b"\0\xff")
        puppet.say("STATUS=ours\nMAINPID=x")
    os.close(writer)
    assert os.read(reader, 1) == b""  # nobody has kept it
    os.close(reader)
    stranger.close()
    puppet.pull("say(b'STATUS=' + b'y' * 5000)")
    puppet.pull("say('BARRIER=1\\nSTATUS=z')")
    assert [puppet.counter(kind) for kind in ("stranger", "oversized", "garbage", "unreadable")] == [
        3,
        4,
        4,
        3,
    ]
    assert puppet.now["status_text"] == "ours"
    for kind in ("stranger", "oversized", "garbage", "unreadable"):
        assert serve.errors().count(f"more of notify.{kind} are counted only") == 1
    # Descriptors that come along for nothing are closed.
    before = len(open_files(serve.supervisor))
    for _ in range(5):
        puppet.say("STATUS=with descriptors", "*[0] * 250")
    wait_for(lambda: len(open_files(serve.supervisor)) <= before, "as few descriptors as before")


@root_only
def test_a_worker_of_another_user_does_not_speak_for_its_master(make: Make, serve: Serve) -> None:
    serve.folder.chmod(0o711)
    puppet = make(more=f'[target.other]\n{SLEEPER}user = "games"\nautostart = false\n')
    puppet.reached("running")
    puppet.pull("os.waitpid(fork(lambda: (os.setuid(5), say('STATUS=worker'), barrier())), 0)")
    assert (puppet.counter("user"), puppet.now["status_text"]) == (1, "")
    assert "may not speak for unit:0" in serve.errors()
    puppet.pull("os.waitpid(fork(lambda: (say('STATUS=worker of root'), barrier())), 0)")
    assert puppet.now["status_text"] == "worker of root"
    # Its main process may, whomever it has become; so may others of that user from then on.
    as_other = "os.setresuid(5, 5, 0), {}, barrier(), os.setresuid(0, 0, 0)"
    puppet.pull(as_other.format("say('STATUS=master')"))
    assert puppet.now["status_text"] == "master"
    work = "os.waitpid(fork(lambda: (os.setuid(5), say('STATUS=its worker'), barrier())), 0)"
    puppet.pull(as_other.format(work.replace("os.setuid(5)", "None")))
    assert puppet.now["status_text"] == "its worker"


def test_a_hook_says_no_more_than_how_it_gets_on(make: Make, serve: Serve) -> None:
    (serve.folder / "hook.py").write_text(
        PUPPET.split("strings =", maxsplit=1)[0]
        + "say('STATUS=hook\\nREADY=1\\nMAINPID=2\\nSTOPPING=1'); barrier()\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
    )
    puppet = make(f'hooks.pre_start = ["{sys.executable}", "-S", "hook.py"]\n')
    wait_for(lambda: puppet.now["status_text"] == "hook", "the hook")
    assert puppet.now["state"] == "starting"
    (serve.folder / "go").touch()
    puppet.reached("running")


# --- fields, one by one -------------------------------------------------------------------------------------


def test_a_barrier_is_passed_when_everything_before_it_was_dealt_with(make: Make) -> None:
    puppet = make()
    puppet.reached("running")
    for number in range(20):
        puppet.pull(f"[say(f'STATUS={number}.{{n}}') for n in range(50)]")
        assert puppet.now["status_text"] == f"{number}.49"


def test_the_error_a_program_gives_is_shown_when_it_fails(make: Make) -> None:
    puppet = make('restart = "on-failure"\nstart_limit_burst = 1\nstart_limit_interval = "1h"\n')
    before = puppet.reached("running")
    puppet.say("ERRNO=28\nSTATUS=no room")
    assert puppet.now["state"] == "running"
    puppet.pull("say('BUSERROR=org.example.Full'), os._exit(3)", wait=False)
    found = puppet.restarted(before)
    assert found["exit"]["status"] == 3
    assert found["exit"]["reason"] == "exit status 3; it said org.example.Full"
    # Nothing of it is left for the next one, and a success needs no reason.
    puppet.pull("say('ERRNO=5\\nSTATUS=x'), os._exit(0)", wait=False)
    assert puppet.reached("exited")["exit"]["reason"] == "exit status 0"
    puppet.client.call("start", names=["unit"])
    puppet.reached("running")
    puppet.say("ERRNO=5")
    puppet.kill_supervisor()
    puppet.pull("os._exit(4)", wait=False)
    wait_for(lambda: (puppet.now["exit"] or {}).get("status") == 4, "the end")
    assert puppet.now["exit"]["reason"] == "exit status 4; it said EIO (Input/output error)"


def test_a_program_that_is_stopping_is_not_ready_and_has_its_time(make: Make) -> None:
    puppet = make('stop_timeout = "300ms"\n')
    before = puppet.reached("running")
    # However long it takes to say both, the supervisor hears of them in one go.
    supervisor = puppet.serve.supervisor
    os.kill(supervisor, signal.SIGSTOP)
    try:
        puppet.pull(
            "say('STOPPING=1\\nSTATUS=bye\\nEXTEND_TIMEOUT_USEC=3600000000'), "
            "say('EXTEND_TIMEOUT_USEC=3600000000'), open('both', 'w').close()",
            wait=False,
        )
        wait_for((puppet.serve.folder / "both").exists, "both to be said")
    finally:
        os.kill(supervisor, signal.SIGCONT)
    puppet.pull("barrier()")
    found = puppet.now
    assert (found["state"], found["ready"], found["detail"]) == ("running", False, "said that it is stopping")
    puppet.kill_supervisor()
    assert (puppet.now["pid"], puppet.now["ready"]) == (before["pid"], False)
    puppet.pull("os._exit(0)", wait=False)
    assert puppet.reached("exited")["exit"]["status"] == 0
    puppet.client.call("start", names=["unit"])
    before = puppet.reached("running")
    puppet.pull("say('STOPPING=1')", wait=False)
    found = puppet.restarted(before)
    assert "said that it is stopping, and was still there 0.3 s later" in found["exit"]["reason"]
    assert found["ready"]


def test_an_extension_never_makes_a_time_out_end_sooner(make: Make) -> None:
    puppet = make('start_timeout = "1h"\n', at_start="say('EXTEND_TIMEOUT_USEC=1'); barrier()")
    puppet.say("READY=1")
    assert puppet.now["restarts"] == 0


HANDSHAKE = """
asked = []
signal.signal(signal.SIGHUP, lambda *_: asked.append(now()))
say("READY=1")
"""


def test_only_the_reload_that_was_asked_for_counts(make: Make) -> None:
    puppet = make('reload_signal = "HUP"\nreload_timeout = "2s"\n', at_start=HANDSHAKE)
    puppet.reached("running")
    # It has begun one by itself when the signal comes, and is done with that only.
    puppet.pull("earlier = now()")
    puppet.pull("say(f'RELOADING=1\\nMONOTONIC_USEC={earlier}')")
    assert puppet.now["state"] == "reloading"
    client = puppet.client
    line = (
        "while not asked: time.sleep(0.01)~"
        "say(f'RELOADING=1\\nMONOTONIC_USEC={earlier}'); say('READY=1'); barrier()"
    )
    puppet.pull(f"exec({line!r}.replace('~', chr(10)))", wait=False)
    assert "no READY=1 within 2 s of SIGHUP" in fails(client, "reload", names=["unit"]).message
    line = (
        "while not asked: time.sleep(0.01)~say('EXTEND_TIMEOUT_USEC=60000000')~barrier()~time.sleep(2.5)~"
        "say('READY=1'); say(f'RELOADING=1\\nMONOTONIC_USEC={now()}'); barrier(); "
        "say('READY=1\\nSTATUS=done')"
    )

    def reloaded() -> Any:
        puppet.pull("asked.clear()")
        puppet.pull(f"exec({line!r}.replace('~', chr(10)))", wait=False)
        with contextlib.suppress(RemoteError):  # it did not come to ask for more time within the 2 s
            return client.call("reload", names=["unit"])["results"][0]["instances"][0]
        return None

    result = wait_for(reloaded, "a reload that takes longer than 2 s")
    assert (result["told_by"], puppet.now["state"], puppet.now["status_text"]) == (
        "signal",
        "running",
        "done",
    )


def test_the_watchdog_waits_for_readiness_and_is_kept_by_the_next_supervisor(make: Make) -> None:
    puppet = make(
        'watchdog_timeout = "1h"\nlimits.core = 0\nrestart = "never"\n',
        at_start="say('WATCHDOG_USEC=100000'); barrier(); time.sleep(0.5)",
    )
    told = "[os.environ['WATCHDOG_USEC'], os.environ['WATCHDOG_PID'] == str(os.getpid())]"
    puppet.pull(f"say('WATCHDOG_USEC=0\\nREADY=1\\nSTATUS=' + repr({told}))")
    assert puppet.now["status_text"] == "['3600000000', True]"
    before = puppet.reached("running")
    puppet.say("WATCHDOG_USEC=3600000000")
    puppet.say("WATCHDOG_USEC=200000000")
    puppet.kill_supervisor()
    puppet.say("WATCHDOG=1")
    assert puppet.now["pid"] == before["pid"]
    puppet.pull("say('WATCHDOG_USEC=50000\\nWATCHDOG=1')", wait=False)
    assert "no sign of life for 0.05 s" in puppet.reached("failed")["exit"]["reason"]


# --- MAINPID ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("session", [False, True])
def test_a_daemon_that_forks_is_supervised_from_then_on(make: Make, session: bool) -> None:
    """Its parent ends at once; the child may lead a group of its own. Its end is that of the instance."""
    puppet = make(
        'restart = "on-failure"\n',
        at_start=(
            f"r, w = os.pipe()\npid = fork(lambda: None) if False else os.fork()\n"
            f"if pid:\n"
            f"    os.read(r, 1)\n    say(f'MAINPID={{pid}}\\nREADY=1')\n    os._exit(0)\n"
            f"{'os.setsid()' if session else ''}\nos.write(w, b'x')"
        ),
    )
    found = puppet.reached("running")
    main = found["pid"]
    assert puppet.ask("os.getpid()") == str(main)
    assert not found["restarts"]
    puppet.say("STATUS=child")
    assert puppet.now["status_text"] == "child"
    puppet.kill_supervisor()
    assert (puppet.now["pid"], puppet.now["state"]) == (main, "running")
    puppet.say("STATUS=still heard")
    assert puppet.now["status_text"] == "still heard"
    puppet.pull("os._exit(7)", wait=False)
    again = puppet.restarted(found)
    assert again["exit"]["status"] == 7  # the keeper has reaped it
    assert puppet.client.call("signal", names=["unit"], signal="KILL")
    assert puppet.restarted(again)["exit"]["signal"] == signal.SIGKILL
    last = puppet.now["pid"]
    puppet.client.call("stop", names=["unit"])
    assert puppet.now["state"] == "stopped"
    assert not alive(last)


def test_a_master_that_lives_on_beside_its_main_process(make: Make) -> None:
    puppet = make('restart = "on-failure"\n')
    before = puppet.reached("running")
    puppet.pull("child = fork(forever, session=True)")
    puppet.pull("say(f'MAINPID={child}')")
    child = puppet.now["pid"]
    assert child == int(puppet.ask("child")) != before["pid"]
    events = puppet.client.call("events.since", seq=0)["events"]
    (named,) = [event for event in events if event["type"] == "instance.main_pid"]
    assert (named["pid"], named["before"]) == (child, before["pid"])
    puppet.say("STATUS=the group is heard as before")
    assert puppet.now["status_text"].startswith("the group")
    # The end of the main process is what counts, and takes the rest with it.
    os.kill(child, signal.SIGTERM)
    found = puppet.restarted({"pid": child})
    assert (found["exit"]["signal"], found["restarts"]) == (signal.SIGTERM, 1)
    assert not alive(before["pid"])
    # The end of the process before does not.
    puppet.pull("child = fork(forever, session=True)")
    puppet.pull("say(f'MAINPID={child}')")
    child = puppet.now["pid"]
    os.kill(found["pid"], signal.SIGKILL)
    wait_for(lambda: not alive(found["pid"]), "its end")
    assert (puppet.now["pid"], puppet.now["state"]) == (child, "running")
    puppet.client.call("stop", names=["unit"])
    assert not alive(child)


def test_the_main_process_before_may_be_the_main_one_again(make: Make, serve: Serve) -> None:
    puppet = make('restart = "never"\n')
    main = puppet.reached("running")["pid"]
    puppet.pull("child = fork(forever)")
    for _ in range(2):
        puppet.pull("say(f'MAINPID={child}')")
        assert puppet.now["pid"] == int(puppet.ask("child"))
        puppet.pull("say(f'MAINPID={os.getpid()}')")
        assert (puppet.now["pid"], puppet.now["state"]) == (main, "running")
    puppet.pull("os.kill(child, signal.SIGKILL); os.waitpid(child, 0)")
    assert (puppet.now["pid"], puppet.now["state"]) == (main, "running")
    puppet.pull("os._exit(7)", wait=False)
    assert puppet.reached("failed")["exit"]["status"] == 7
    # Its end has one reader, that of the child another.
    wait_for(lambda: "its main process before, has ended" in serve.errors(), "the end of the child")
    puppet.client.call("supervisor.info")
    assert "Exception in callback" not in serve.errors()
    assert serve.errors().count("its main process before") == 1


def test_a_main_process_that_is_not_its_own_is_refused(make: Make, serve: Serve) -> None:
    puppet = make(more=f"[target.other]\n{SLEEPER}")
    before = puppet.reached("running")
    other = reached(puppet.client, "other", "running")["pid"]
    ended = puppet.ask("(lambda pid: (os.waitpid(pid, 0), pid)[1])(fork(lambda: None))")
    for pid in (os.getpid(), serve.supervisor, other, ended, 1 << 30):
        puppet.say(f"MAINPID={pid}")
        assert puppet.now["pid"] == before["pid"]
    assert puppet.counter("main_pid") == 5
    assert f"MAINPID={other} is refused: process {other} is neither of its group" in serve.errors()
    puppet.client.call("restart", names=["unit"])
    assert alive(other)


# --- FDSTORE ------------------------------------------------------------------------------------------------

STORED = (
    "[os.environ.get('LISTEN_FDNAMES'), os.environ.get('LISTEN_PID') == str(os.getpid()), "
    "[os.pread(3 + n, 9, 0).decode() for n in range(passed())]]"
)
MEMORY = "(lambda fd: (os.write(fd, {!r}), fd)[1])(os.memfd_create('m'))"


def test_stored_descriptors_outlive_program_patches_and_supervisor(make: Make, serve: Serve) -> None:
    puppet = make("fd_store_max = 3\n")
    before = puppet.reached("running")
    assert puppet.ask("os.environ['FDSTORE']") == "3"
    assert puppet.ask(STORED) == "[None, False, []]"
    puppet.say("FDSTORE=1\nFDNAME=a b", MEMORY.format(b"first"))
    puppet.pull(f"second = {MEMORY.format(b'second')}")
    puppet.say("FDSTORE=1", "second")
    puppet.say("FDSTORE=1", "second", "second")  # known already
    assert puppet.counter("fd_store") == 0
    expected = str(["a b:stored", True, ["first", "second"]])
    puppet.client.call("restart", names=["unit"])
    assert puppet.restarted(before)
    assert puppet.ask(STORED) == expected
    # What it finds it may store again, and nothing is there twice.
    puppet.say("FDSTORE=1\nFDNAME=again", "3", "4")
    puppet.kill_supervisor()
    before = puppet.now
    os.kill(before["pid"], signal.SIGKILL)
    puppet.restarted(before)
    assert puppet.ask(STORED) == expected
    # Its last words count as well, here with the limit.
    before = puppet.now
    puppet.pull(
        f"say('FDSTORE=1\\nFDNAME=last', {MEMORY.format(b'third')}, {MEMORY.format(b'fourth')}), os._exit(1)",
        wait=False,
    )
    puppet.restarted(before)
    assert puppet.ask(STORED) == str(["a b:stored:last", True, ["first", "second", "third"]])
    assert puppet.counter("fd_store") == 1
    assert "unit:0 may store 3 descriptors (fd_store_max)" in serve.errors()
    before = puppet.now
    puppet.say("FDSTOREREMOVE=1\nFDNAME=a b")
    puppet.say("FDSTOREREMOVE=1\nFDNAME=unknown")
    os.kill(before["pid"], signal.SIGKILL)
    puppet.restarted(before)
    assert puppet.ask(STORED) == str(["stored:last", True, ["second", "third"]])
    # A program it starts does not take them for its own; hooks and the like do not get them.
    assert puppet.ask("os.environ['LISTEN_PID']") == str(puppet.now["pid"])
    before = puppet.now
    puppet.client.call("stop", names=["unit"])
    puppet.client.call("start", names=["unit"])
    puppet.reached("running")
    assert puppet.ask(STORED) == "[None, False, []]"
    assert serve.process is not None
    for pid in (serve.process.pid, serve.supervisor):
        wait_for(partial(nothing_of_memory, pid), f"process {pid} to let them go")


def test_a_stored_descriptor_goes_with_its_other_end_unless_told_otherwise(make: Make, serve: Serve) -> None:
    puppet = make('fd_store_max = 9\nsockets = ["web"]\n', more='[socket.web]\nlisten = "unix://web.sock"\n')
    before = puppet.reached("running")
    puppet.pull("a, b, c = socket.socketpair(), socket.socketpair(), os.pipe()")
    puppet.say("FDSTORE=1\nFDNAME=polled", "a[0].fileno()")
    puppet.say("FDSTORE=1\nFDNAME=kept\nFDPOLL=0", "b[0].fileno()")
    puppet.say("FDSTORE=1\nFDNAME=pipe", "c[0]", "c[1]")  # it holds both ends
    puppet.kill_supervisor()
    puppet.reached("running")
    puppet.pull("a[1].close(), a[0].close()")
    wait_for(lambda: "its other end has (polled)" in serve.errors(), "the hang-up")
    os.kill(before["pid"], signal.SIGKILL)
    puppet.restarted(before)
    assert puppet.ask("os.environ['LISTEN_FDNAMES']") == "web:kept:pipe:pipe"
    assert puppet.ask("[socket.socket(fileno=os.dup(n)).type.name for n in (3, 4)]") == str(
        ["SOCK_STREAM", "SOCK_STREAM"]
    )
    assert puppet.ask("os.write(6, b'through') and os.read(5, 9)") == "b'through'"


def test_stored_descriptors_outlive_a_cold_patch(make: Make, serve: Serve) -> None:
    for name, content in (("root", "old"), ("old", "old"), ("new", "new")):
        (serve.folder / name).mkdir()
        (serve.folder / name / "file").write_text(content)
    puppet = make('fd_store_max = 1\nroot = "root"\n', more='[patch]\ntrust = "none"\nprobation = "0s"\n')
    before = puppet.reached("running")
    puppet.say("FDSTORE=1\nFDNAME=kept", MEMORY.format(b"content"))
    build_patch(
        old=serve.folder / "old", new=serve.folder / "new", output=serve.folder / "p.zip", name="p",
        version="1", build=1, kind=Kind.COLD, targets=["unit"], regions=["local"],
    )  # fmt: skip
    report = puppet.client.call("patch.apply", path=str(serve.folder / "p.zip"))
    assert report["verdict"] == "committed"
    assert puppet.now["pid"] != before["pid"]
    assert puppet.ask(STORED) == str(["kept", True, ["content"]])


def test_nothing_is_stored_unless_configured(make: Make) -> None:
    puppet = make()
    before = puppet.reached("running")
    puppet.say("FDSTORE=1", MEMORY.format(b"x"))
    assert puppet.counter("fd_store") == 1
    os.kill(before["pid"], signal.SIGKILL)
    puppet.restarted(before)
    assert puppet.ask("passed()") == "0"


@pytest.mark.anyio
async def test_who_ends_when_nobody_listens_any_more_is_not_heard(short_tmp: Path) -> None:
    heard = NotifySocket(short_tmp / "notify", lambda *_: None)
    heard.close()
    heard.hear_last_words()
