"""What survives what: the supervisor, its keeper, or both are killed, or replaced on purpose.

Everything is killed for real, and looked at from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, alive, children_of, end_process, processes_of_this_run, wait_for
from test_patching import Field
from test_supervisor import QUICK, SLEEPER, instance, reached, target
from told import Tell

from asyncsup.child import pidfd_inode, read_facts
from asyncsup.client import ControlClient
from asyncsup.errors import AsyncsupError, RemoteError
from asyncsup.journal import Journal
from asyncsup.keeper import (
    LONGEST_PAUSE_SECONDS,
    MOST_FAILURES,
    STEADY_SECONDS,
    Keeper,
    read_state,
    write_state,
)
from asyncsup.patch.manifest import Kind

COUNTER = 'command = ["sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.01; done"]\n'
"""A program whose output shows whether anything of it is missing or there twice."""
ON_DEMAND = (
    'command = ["sh", "-c", "echo first; while [ ! -e end ]; do sleep 0.01; done; printf last; exit 7"]\n'
)
"""A program that ends when the file `end` is made."""


@pytest.fixture
def serve(short_tmp: Path) -> Iterator[Serve]:
    server = Serve(short_tmp)
    yield server
    with contextlib.suppress(subprocess.TimeoutExpired):
        if server.process is not None:
            server.stop(timeout=60)
    assert "Traceback" not in server.errors(), server.errors()
    for line in processes_of_this_run():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)


def up(serve: Serve, text: str) -> ControlClient:
    client = serve.start(text)
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    return client


def pids(client: ControlClient) -> dict[str, int | None]:
    return {i["name"]: i["pid"] for t in client.call("status")["targets"] for i in t["instances"]}


@contextlib.contextmanager
def nobody_there(serve: Serve) -> Iterator[None]:
    """While the block runs there is a keeper that does nothing, and no supervisor."""
    assert serve.process is not None
    os.kill(serve.process.pid, signal.SIGSTOP)
    serve.kill_supervisor()
    try:
        yield
    finally:
        os.kill(serve.process.pid, signal.SIGCONT)


def numbers(serve: Serve, name: str) -> list[int]:
    """The numbers of the lines a `COUNTER` has written, over all rotated files."""
    files = sorted((serve.folder / ".asyncsup/logs").glob(f"{name}.log*"), key=_age, reverse=True)
    text = "".join(path.read_text() for path in files)
    assert not text or text.endswith("\n")
    return [int(number) for number in re.findall(r"line (\d+)", text)]


def _age(path: Path) -> int:
    return int(path.suffix[1:]) if path.suffix[1:].isdecimal() else 0


def reached_text(client: ControlClient, name: str, text: str) -> None:
    wait_for(lambda: instance(client, name)["status_text"] == text, f"{name} to say {text!r}")


def ends(pid: int) -> None:
    wait_for(lambda: not alive(pid), f"the end of process {pid}")


# --- the supervisor is killed -------------------------------------------------------------------------------


def test_a_killed_supervisor_is_back_with_every_child_and_every_line(serve: Serve) -> None:
    client = up(
        serve,
        f'{QUICK}[target.a]\n{COUNTER}instances = 3\n[target.b]\n{COUNTER}log = {{ format = "timestamp" }}\n'
        f'[target.c]\n{COUNTER}log = {{ format = "json" }}\n',
    )
    before = pids(client)
    client.close()
    killed = serve.kill_supervisor()
    client = serve.connect()
    info = client.call("supervisor.info")
    assert info["pid"] != killed
    assert info["keeper"] == serve.process.pid  # type: ignore[union-attr]
    assert info["adopted"] == len(before)
    assert pids(client) == before
    assert {i["restarts"] for t in client.call("status")["targets"] for i in t["instances"]} == {0}
    seen = {name: len(numbers(serve, name)) for name in ("a.0", "a.1", "a.2", "b.0", "c.0")}
    for name, count in seen.items():
        wait_for(lambda n=name, c=count: len(numbers(serve, n)) > c, f"more lines of {name}")  # type: ignore[misc]
    client.call("stop", names=["all"])
    for name in seen:
        found = numbers(serve, name)
        assert found == list(range(len(found))), name
    assert not any(alive(pid) for pid in before.values() if pid is not None)
    client.close()


def test_how_an_adopted_process_ends_is_known(serve: Serve) -> None:
    client = up(serve, f'{QUICK}[target.web]\n{ON_DEMAND}restart = "never"\n[target.db]\n{SLEEPER}')
    db = instance(client, "db")["pid"]
    client.close()
    serve.kill_supervisor()
    client = serve.connect()
    (serve.folder / "end").touch()
    assert reached(client, "web", "failed")["exit"]["status"] == 7
    assert client.call("logs", name="web")["chunks"][0]["text"] == "first\nlast"
    os.kill(db, signal.SIGKILL)
    wait_for(lambda: instance(client, "db")["pid"] not in {None, db}, "another process")
    found = instance(client, "db")
    assert found["exit"]["reason"] == "killed by SIGKILL"
    assert found["restarts"] == 1
    client.close()


def test_what_ends_while_nobody_is_there_is_seen_to_with_its_status_and_its_last_words(serve: Serve) -> None:
    client = up(
        serve,
        f'{QUICK}[target.web]\n{ON_DEMAND}restart = "never"\n[target.db]\n{SLEEPER}'
        '[target.job]\ncommand = ["sh", "-c", "while [ ! -e end ]; do sleep 0.01; done"]\n',
    )
    before = pids(client)
    client.close()
    with nobody_there(serve):
        (serve.folder / "end").touch()
        os.kill(before["db:0"] or 0, signal.SIGKILL)
        for pid in before.values():
            ends(pid or 0)
    client = serve.connect()
    assert reached(client, "web", "failed")["exit"]["status"] == 7
    assert client.call("logs", name="web")["chunks"][0]["text"] == "first\nlast"
    assert instance(client, "job")["state"] == "exited"  # its policy is content with status 0
    db = reached(client, "db", "running")
    assert db["pid"] != before["db:0"]
    assert db["exit"]["reason"] == "killed by SIGKILL"
    client.close()


def test_what_an_operator_wanted_and_what_the_policy_counted_is_not_forgotten(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.off]\n{SLEEPER}[target.part]\n{SLEEPER}instances = 2\n"
        '[target.done]\ncommand = "true"\n'
        '[target.bad]\ncommand = "false"\nrestart_delay = "1h"\nrestart_max_delay = "2h"\n'
        '[target.worst]\ncommand = "false"\nrestart = "never"\n'
    )
    client.call("wait", {"names": ["off", "part"], "for": "ready", "timeout": 60})
    client.call("stop", names=["off", "part:1"])
    for name, state in (("done", "exited"), ("bad", "backoff"), ("worst", "failed")):
        reached(client, name, state)
    before = {t["name"]: t for t in client.call("status")["targets"]}
    client.close()
    serve.kill_supervisor()
    client = serve.connect()
    client.call("wait", {"names": ["part:0"], "for": "ready", "timeout": 60})
    for found in client.call("status")["targets"]:
        known = before[found["name"]]
        for key in ("wanted", "state"):
            assert found[key] == known[key], (found["name"], key)
        for now, then in zip(found["instances"], known["instances"], strict=True):
            for key in ("state", "pid", "restarts", "exit", "detail"):
                assert now[key] == then[key], (now["name"], key)
    client.call("start", names=["off"])
    client.call("stop", names=["bad"])
    assert instance(client, "bad")["state"] == "stopped"
    client.close()


def test_readiness_that_is_said_while_nobody_is_there_counts(serve: Serve) -> None:
    (serve.folder / "unit.py").write_text(
        "import os, socket, time\n"
        "while not os.path.exists('go'): time.sleep(0.01)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n"
        "open('said', 'w').close()\n"
        "time.sleep(3600)\n"
    )
    client = serve.start(
        f'{QUICK}[target.unit]\ncommand = ["{sys.executable}", "unit.py"]\nprotocol = "notify"\n'
        'start_timeout = "100s"\n'
    )
    pid = reached(client, "unit", "starting")["pid"]
    client.close()
    with nobody_there(serve):
        (serve.folder / "go").touch()
        wait_for((serve.folder / "said").exists, "READY=1")
    client = serve.connect()
    assert reached(client, "unit", "running")["pid"] == pid
    client.close()


def test_a_stop_that_was_under_way_is_finished_and_the_whole_tree_goes(serve: Serve) -> None:
    """The leader ends at once; what it leaves behind ignores the signal and is killed."""
    client = up(
        serve,
        f'{QUICK}[target.tree]\ncommand = ["sh", "-c", "(trap : TERM; while :; do sleep 0.05; done) & '
        "trap 'touch asked' TERM; echo $! > child; while [ ! -e asked ]; do sleep 0.02; done\"]\n"
        'stop_timeout = "2s"\n',
    )
    leader = instance(client, "tree")["pid"]
    file = serve.folder / "child"
    child = int(wait_for(lambda: file.exists() and file.read_text().strip(), "the child"))
    client.close()
    request = subprocess.Popen(
        [sys.executable, "-m", "asyncsup", "--endpoint", serve.endpoint, "stop", "tree"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for((serve.folder / "asked").exists, "the signal")
    serve.kill_supervisor()
    request.wait(60)
    client = serve.connect()
    reached(client, "tree", "stopped")
    assert target(client, "tree")["wanted"] == "down"
    assert not alive(leader)
    assert not alive(child)
    client.close()


def test_sdk_programs_come_back_by_themselves(serve: Serve) -> None:
    (serve.folder / "app.py").write_text(
        "from target_sdk import Target\n"
        "target = Target(build=7)\n"
        "reloads = []\n"
        "target.on_reload(lambda patch: target.status(f'reloaded {len(reloads)}') or reloads.append(1))\n"
        "with target:\n"
        "    target.status('hello'); target.ready()\n"
        "    while True: target.run_pending(timeout=None)\n"
    )
    client = up(
        serve, f'[target.app]\ncommand = ["{sys.executable}", "app.py"]\nprotocol = "sdk"\nbuild = 7\n'
    )
    pid = instance(client, "app")["pid"]
    client.close()
    for number in range(2):
        serve.kill_supervisor()
        client = serve.connect()
        found = instance(client, "app")
        assert (found["pid"], found["state"], found["sdk"], found["build"]) == (pid, "running", True, 7)
        client.call("reload", names=["app"])
        reached_text(client, "app", f"reloaded {number}")
        assert client.call("supervisor.info")["counters"].get("target.foreign_token", 0) == 0
        client.close()


# --- the keeper is killed, or both --------------------------------------------------------------------------


def test_without_its_keeper_the_supervisor_ends_and_the_next_serve_takes_everything_back(
    serve: Serve,
) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{COUNTER}instances = 2\n[target.db]\n{ON_DEMAND}")
    before = pids(client)
    client.close()
    serve.kill()
    assert all(alive(pid) for pid in before.values() if pid is not None)
    client = serve.start()
    assert pids(client) == before
    (serve.folder / "end").touch()
    # The kernel tells it by the pidfd, though the keeper is not its parent.
    wait_for(lambda: instance(client, "db")["exit"], "the end of db")
    assert instance(client, "db")["exit"]["status"] == 7
    client.call("stop", names=["all"])
    for name in ("web.0", "web.1"):
        found = numbers(serve, name)
        assert found == list(range(len(found)))
    client.close()


def test_an_exit_that_nobody_could_see_is_a_failure(serve: Serve) -> None:
    client = up(serve, f'{QUICK}[target.web]\n{ON_DEMAND}restart = "never"\n')
    pid = instance(client, "web")["pid"]
    supervisor = client.call("supervisor.info")["pid"]
    client.close()
    serve.kill()
    ends(supervisor)
    (serve.folder / "end").touch()
    # As long as init has not reaped it, its status is there to be read.
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the process to be reaped", 60)
    client = serve.start()
    assert "ended unseen" in reached(client, "web", "failed")["detail"]
    client.close()


def test_without_a_keeper_it_is_the_same_but_for_who_starts_it_again(serve: Serve) -> None:
    serve.alone = True
    client = up(serve, f"{QUICK}[target.web]\n{COUNTER}")
    assert client.call("supervisor.info")["keeper"] is None
    before = pids(client)
    client.close()
    serve.kill()
    client = serve.start()
    assert pids(client) == before
    client.call("stop", names=["all"])
    found = numbers(serve, "web.0")
    assert found == list(range(len(found)))
    client.close()


def test_orphans_are_replaced_where_that_is_wanted(serve: Serve) -> None:
    text = f'[supervisor]\norphans = "kill"\n{QUICK}[target.web]\n{SLEEPER}[target.off]\n{SLEEPER}'
    client = up(serve, text)
    client.call("stop", names=["off"])
    pid = instance(client, "web")["pid"]
    client.close()
    serve.kill_supervisor()
    client = serve.connect()
    wait_for(lambda: instance(client, "web")["pid"] not in {None, pid}, "another process")
    assert not alive(pid)
    assert instance(client, "off")["state"] == "stopped"
    client.close()


def test_an_instance_that_is_not_configured_any_more_is_ended(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}[target.gone]\n{SLEEPER}")
    before = pids(client)
    client.close()
    serve.kill()
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}[target.new]\n{SLEEPER}")
    ends(before["gone:0"] or 0)
    assert instance(client, "web")["pid"] == before["web:0"]
    client.close()


# --- whose process it is ------------------------------------------------------------------------------------


def forge(serve: Serve, pid: int | None, **changes: Any) -> None:
    """Have the journal say that web:0 is another process, or one that was about to be spawned."""
    identity: dict[str, Any] = {"pid": None, "start_ticks": 0, "inode": 0}
    if pid is not None:
        facts = read_facts(pid)
        assert facts is not None
        pidfd = os.pidfd_open(pid)
        identity = {"pid": pid, "start_ticks": facts.start_ticks, "inode": pidfd_inode(pidfd)}
        os.close(pidfd)
    journal = Journal(serve.folder / ".asyncsup/journal")
    record = journal.left_behind["instance web:0"]
    record["process"] = {"token": "old", **(record["process"] or {}), **identity, **changes}
    record |= {"state": "running", "wanted": True}
    journal.put("target web", {"wanted": True})
    journal.put("instance web:0", record)
    journal.close(empty=False)


@contextlib.contextmanager
def foreigner(**environ: str) -> Iterator[int]:
    process = subprocess.Popen(["sleep", "3600"], start_new_session=True, env={**os.environ, **environ})
    try:
        yield process.pid
        assert process.poll() is None, "a foreign process was ended"
    finally:
        process.kill()
        process.wait()


def test_a_pid_that_is_another_process_by_now_is_left_alone(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}")
    pid = instance(client, "web")["pid"]
    client.close()
    serve.kill()
    end_process(pid)
    ends(pid)
    with foreigner() as foreign:
        forge(serve, foreign, start_ticks=1)
        client = serve.start()
        assert reached(client, "web", "running")["pid"] not in {pid, foreign}
        client.call("stop", names=["web"])
        client.close()


def test_a_process_with_another_token_is_left_alone_and_reported_as_lost(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}")
    pid = instance(client, "web")["pid"]
    client.close()
    serve.kill()
    end_process(pid)
    with foreigner(ASYNCSUP_TOKEN="another") as foreign:
        forge(serve, foreign)
        client = serve.start()
        found = reached(client, "web", "lost")
        assert f"pid {foreign}" in found["detail"]
        assert found["pid"] is None
        client.call("stop", names=["web"])
        assert instance(client, "web")["state"] == "stopped"
        client.close()
        serve.kill()
        forge(serve, foreign)
        client = serve.start()
        reached(client, "web", "lost")
        client.call("start", names=["web"])
        assert reached(client, "web", "running")["pid"] not in {None, foreign}
        client.call("stop", names=["web"])
        client.close()


def test_a_lost_process_that_ends_makes_room_for_another(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}")
    pid = instance(client, "web")["pid"]
    client.close()
    serve.kill()
    end_process(pid)
    process = subprocess.Popen(["sleep", "3600"], env={**os.environ, "ASYNCSUP_TOKEN": "another"})
    forge(serve, process.pid)
    client = serve.start()
    reached(client, "web", "lost")
    process.kill()
    process.wait()
    assert reached(client, "web", "running")["pid"] not in {None, process.pid}
    client.close()


def test_a_program_that_hides_its_environment_is_known_by_its_pidfd(serve: Serve) -> None:
    client = up(serve, f'{QUICK}[target.web]\ncommand = "env -i sleep 3600"\n')
    before = pids(client)
    process = Path(f"/proc/{before['web:0']}")
    wait_for(lambda: (process / "cmdline").read_bytes() == b"sleep\x003600\x00", "env to become sleep")
    assert b"ASYNCSUP" not in (process / "environ").read_bytes()
    client.close()
    serve.kill_supervisor()
    client = serve.connect()
    assert pids(client) == before
    client.close()


def test_a_process_that_nobody_wrote_down_is_found_by_its_token(serve: Serve) -> None:
    """The supervisor died between the spawn and the note of it."""
    client = up(serve, f"{QUICK}[target.web]\n{COUNTER}")
    pid = instance(client, "web")["pid"]
    client.close()
    serve.kill()
    forge(serve, None)
    client = serve.start()
    assert instance(client, "web")["pid"] == pid
    client.call("stop", names=["web"])
    assert not alive(pid)
    client.close()


def test_a_spawn_that_did_not_come_about_is_made_up_for(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}")
    pid = instance(client, "web")["pid"]
    client.close()
    serve.kill()
    end_process(pid)
    forge(serve, None, token="of nobody")
    client = serve.start()
    found = reached(client, "web", "running")
    assert found["pid"] not in {None, pid}
    assert found["restarts"] == 0
    client.close()


def test_a_stop_whose_post_stop_is_not_waited_for_any_more_comes_to_an_end(serve: Serve) -> None:
    hook = "sh -c 'touch cleaning; while [ ! -e end ]; do sleep 0.05; done'"
    client = up(serve, f'{QUICK}[target.web]\n{SLEEPER}hooks.post_stop = "{hook}"\n')
    before = instance(client, "web")["pid"]
    client.call("restart", names=["web"], wait=False)
    wait_for((serve.folder / "cleaning").exists, "the hook")
    client.call("stop", names=["web"], wait=False)
    found = instance(client, "web")
    assert (found["state"], found["pid"]) == ("stopping", None)
    client.close()
    try:
        serve.kill_supervisor()
        client = serve.connect()
        assert reached(client, "web", "stopped")["pid"] is None
    finally:
        (serve.folder / "end").touch()
    client.call("start", names=["web"])
    assert reached(client, "web", "running")["pid"] not in {None, before}
    client.close()


# --- replacement on purpose ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [False, True], ids=["keeper", "no keeper"])
def test_reexec_keeps_every_child_and_every_line(serve: Serve, alone: bool) -> None:
    serve.alone = alone
    client = up(
        serve,
        f'[supervisor]\norphans = "kill"\n{QUICK}[target.web]\n{COUNTER}instances = 2\n'
        f'[target.text]\n{COUNTER}log = {{ format = "timestamp" }}\n'
        f'[target.job]\n{ON_DEMAND}restart = "never"\n',
    )
    before, first = pids(client), client.call("supervisor.info")
    client.close()
    for _ in range(2):
        cli(serve, "reexec")
    client = serve.connect()
    info = client.call("supervisor.info")
    assert info["started"] != first["started"]
    assert (info["pid"] == first["pid"]) is alone
    assert info["keeper"] == first["keeper"]
    assert pids(client) == before
    (serve.folder / "end").touch()
    assert reached(client, "job", "failed")["exit"]["status"] == 7
    if not alone:
        # That was on purpose; this is not.
        client.close()
        serve.kill_supervisor()
        client = serve.connect()
        wait_for(lambda: pids(client)["web:0"] not in {None, before["web:0"]}, "another process")
    client.call("stop", names=["all"])
    if alone:
        for name in ("web.0", "web.1", "text.0"):
            found = numbers(serve, name)
            assert found == list(range(len(found)))
    client.close()


def test_a_signal_that_arrives_while_the_keeper_is_replaced_ends_it(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}")
    target_pid = instance(client, "web")["pid"]
    assert serve.process is not None
    before = serve.supervisor
    os.kill(serve.process.pid, signal.SIGSTOP)
    try:
        client.call("supervisor.reexec")
        client.close()
        wait_for(lambda: not alive(before), "the supervisor to have said its last words, and ended")
        os.kill(serve.process.pid, signal.SIGTERM)
    finally:
        os.kill(serve.process.pid, signal.SIGCONT)
    assert serve.process.wait(60) == 0
    assert not alive(target_pid)


def test_a_program_that_would_not_start_leaves_the_old_one_running(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}")
    before, first = pids(client), client.call("supervisor.info")
    broken = serve.folder / "asyncsup-broken"
    broken.write_text(f"#!{sys.executable}\nraise ImportError('no such module in this version')\n")
    broken.chmod(0o755)
    with pytest.raises(RemoteError) as caught:
        client.call("supervisor.reexec", program=str(broken))
    assert caught.value.error_code == "reexec.failed"
    assert "no such module in this version" in caught.value.message
    serve.write("[target.web]\ncommand = 3\n")
    with pytest.raises(RemoteError) as caught:
        client.call("supervisor.reexec")
    assert "target.web.command" in caught.value.message
    assert client.call("supervisor.info")["started"] == first["started"]
    assert pids(client) == before
    client.close()


def test_a_program_that_passes_its_check_and_then_does_not_come_up_gives_way_to_the_one_before(
    serve: Serve,
) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{COUNTER}")
    before, first = pids(client), client.call("supervisor.info")
    faulty = serve.folder / "asyncsup-faulty"
    faulty.write_text(
        f"#!{sys.executable}\nimport sys\nfrom asyncsup.cli import main\n"
        "sys.exit(main() if '--check' in sys.argv else 3)\n"
    )
    faulty.chmod(0o755)
    client.call("supervisor.reexec", program=str(faulty))
    client.close()
    wait_for(lambda: "going back" in serve.errors(), "the keeper's word")
    client = serve.connect()
    assert client.call("supervisor.info")["started"] != first["started"]
    assert pids(client) == before
    client.call("stop", names=["all"])
    found = numbers(serve, "web.0")
    assert found == list(range(len(found)))
    client.close()


def cli(serve: Serve, *words: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "asyncsup", "-c", str(serve.config), *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- the keeper ---------------------------------------------------------------------------------------------


def test_serve_ends_as_the_supervisor_does(serve: Serve) -> None:
    client = up(serve, f"[target.web]\n{SLEEPER}")
    client.close()
    for text in cli(serve, "shutdown").splitlines()[-1:]:
        assert text == "the supervisor has ended"
    assert serve.process is not None
    assert serve.process.wait(60) == 0
    serve.write("[target.web]\ncommand = 3\n")
    for alone in (False, True):
        serve.alone = alone
        result = subprocess.run(serve.command(), capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 5
        assert "target.web.command" in result.stderr
        assert "keeper" not in result.stderr


def test_a_supervisor_killed_before_it_served_ends_serve_as_it_was_ended_itself(serve: Serve) -> None:
    serve.write(f"[target.web]\n{SLEEPER}")
    result = subprocess.run(
        serve.command(), capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "ASYNCSUP_FAILPOINT": "store.register.recorded:kill"},
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL
    assert "before it was ready" in result.stderr


def test_a_broken_configuration_is_waited_for_and_the_targets_run_on(serve: Serve) -> None:
    text = f"{QUICK}[target.web]\n{SLEEPER}"
    client = up(serve, text)
    before = pids(client)
    client.close()
    serve.write("[target.web]\ncommand = 3\n")
    serve.kill_supervisor()
    assert serve.process is not None
    wait_for(lambda: "trying again in" in serve.errors(), "the keeper's word")
    assert serve.process.poll() is None
    serve.write(text)
    serve.process.send_signal(signal.SIGHUP)
    client = serve.connect()
    assert pids(client) == before
    client.close()


def test_a_signal_while_the_supervisor_is_away_ends_everything_when_it_is_back(serve: Serve) -> None:
    client = up(serve, f"{QUICK}[target.web]\n{SLEEPER}instances = 3\n")
    before = pids(client)
    client.close()
    assert serve.process is not None
    with nobody_there(serve):
        serve.process.send_signal(signal.SIGTERM)
    assert serve.process.wait(60) == 0
    assert not any(alive(pid) for pid in before.values() if pid is not None)


def test_ctrl_c_reaches_both_and_counts_once(serve: Serve) -> None:
    """A second one would kill what is left; it takes its time to end, and is given it."""
    script = "trap 'sleep 1; echo bye; exit 0' INT TERM; echo up; while :; do sleep 0.05; done"
    serve.write(
        f'{QUICK}[target.slow]\ncommand = ["sh", "-c", "{script}"]\nready.log = "^up$"\nstop_timeout = "1m"\n'
    )
    with serve.stderr.open("ab") as stderr:
        serve.process = subprocess.Popen(
            serve.command(), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, start_new_session=True
        )
    client = serve.connect()
    client.call("wait", {"names": ["slow"], "for": "ready", "timeout": 60})
    client.close()
    os.killpg(serve.process.pid, signal.SIGINT)
    assert serve.process.wait(60) == 0
    assert "bye\n" in (serve.folder / ".asyncsup/logs/slow.0.log").read_text()
    assert "killing what is left" not in serve.errors()


def test_strays_are_reaped_and_forgotten(serve: Serve) -> None:
    client = up(
        serve,
        f'{QUICK}[target.web]\ncommand = ["sh", "-c", "(sleep 0.1 &) ; exec sleep 3600"]\ninstances = 5\n',
    )
    assert serve.process is not None
    expected = {serve.supervisor}
    wait_for(
        lambda: set(children_of(serve.process.pid)) == expected,  # type: ignore[union-attr]
        "the keeper to have no other children",
    )
    client.close()


def test_the_keeper_is_small(serve: Serve, tell: Tell) -> None:
    client = up(serve, f"[target.web]\n{SLEEPER}")
    assert serve.process is not None
    loaded = Path(f"/proc/{serve.process.pid}/maps").read_text()
    for library in ("zmq", "orjson", "sqlite3", "_asyncio", "libssl"):
        assert library not in loaded
    rollup = Path(f"/proc/{serve.process.pid}/smaps_rollup").read_text()
    pss = int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0])
    tell(f"{pss / 1024:.1f} MiB PSS")
    assert pss < 12 * 1024
    client.close()


def crashes(keeper: Keeper, pause: float) -> bool:
    """Whether it waits for so many seconds before the next start."""
    before = time.monotonic()
    assert keeper.crashed() is None
    after = time.monotonic()
    assert keeper.start_at is not None
    return keeper.start_at - after - 1e-6 <= pause <= keeper.start_at - before + 1e-6


def test_crashes_in_a_row_are_answered_more_and_more_slowly() -> None:
    keeper = Keeper()
    keeper.understand("ready", "", [])
    keeper.ready_since += 3600  # however long this takes, it is not steady
    for pause in (0.0, 0.1, 0.2, 0.4, 0.8):
        assert crashes(keeper, pause)
    for _ in range(15):
        last = crashes(keeper, LONGEST_PAUSE_SECONDS)
    assert last
    keeper.ready_since -= 3600 + STEADY_SECONDS
    assert crashes(keeper, 0.0)


def test_a_keeper_hands_all_that_it_knows_to_the_one_that_it_becomes() -> None:
    keeper = Keeper()
    keeper.soft_limit, keeper.crashes, keeper.was_ever_ready = 64, 3, True
    keeper.command, keeper.command_before = ["a b", "\n"], ["c"]
    keeper.exits[7, 8] = 9
    keeper.ending_signal = signal.SIGTERM
    keeper.held["output/web"] = os.memfd_create("held")
    state = os.memfd_create("state")
    try:
        os.write(state, write_state(keeper))
        again = read_state(state)
    finally:
        os.close(keeper.held["output/web"])
    for name in (
        "soft_limit", "crashes", "was_ever_ready", "command", "command_before", "exits", "ending_signal",
        "held", "supervisor", "channel",
    ):  # fmt: skip
        assert getattr(again, name) == getattr(keeper, name), name


def test_a_supervisor_that_does_not_come_up_any_more_is_given_up() -> None:
    keeper = Keeper()
    keeper.was_ever_ready = True
    for _ in range(MOST_FAILURES - 1):
        assert keeper.crashed() is None
    assert keeper.crashed() == 1


# --- how long it takes --------------------------------------------------------------------------------------


def test_three_hundred_instances_are_taken_back(serve: Serve, tell: Tell) -> None:
    client = serve.start(f"[target.many]\n{SLEEPER}instances = 300\nmin_uptime = 0\n")
    client.call("wait", {"names": ["many"], "for": "ready", "timeout": 100})
    before = pids(client)
    client.close()
    began = time.monotonic()
    serve.kill_supervisor()
    client = serve.connect()
    took = time.monotonic() - began
    assert pids(client) == before
    assert client.call("supervisor.info")["adopted"] == 300
    found = re.findall(r"300 of 300 instances taken back in (\d+) ms", serve.errors())
    tell(f"taken back in {found[-1]} ms; answers {took:.2f} s after the kill")
    client.close()


# --- patches that were under way ----------------------------------------------------------------------------


@contextlib.contextmanager
def killed_during(field: Field, package: Path, told: str) -> Iterator[None]:
    """Apply until target `web` says something, run the block, then kill the supervisor; a new one answers."""
    with field.applying(package) as outcome:
        field.said("web", told)
        yield
        field.client.close()
        field.serve.kill_supervisor()
        field.client = field.serve.connect()
    assert isinstance(outcome[0], AsyncsupError), "the client of a killed supervisor was told something"


def history(field: Field) -> Any:
    (entry,) = field.client.call("patch.history")["transactions"]
    return field.client.call("patch.show", id=str(entry["txn"]))


def ended(field: Field, verdict: str) -> Any:
    return wait_for(
        lambda: history(field) if history(field)["verdict"] == verdict else None,
        f"a patch that was {verdict}",
    )


def test_who_had_been_told_of_a_patch_that_recovery_takes_back_is_told_of_that(field: Field) -> None:
    """`db` has not answered yet; `web` has taken it up."""
    field.start("web", "db", defaults='[defaults.patch]\nack_timeout = "1m"')
    before = pids(field.client)
    field.behave("db", reload="never")
    with killed_during(field, field.package("web", "db", probation=30.0), "build=300 a.txt=new-a"):
        pass
    for name in ("web", "db"):
        field.said(name, "one build=200 a.txt=old-a")
        assert field.content(name)["a.txt"] == "old-a"
        assert field.target(name)["build"] == 200
    assert pids(field.client) == before
    found = ended(field, "rolled_back")
    assert found["code"] == "patch.interrupted"
    (step,) = wait_for(
        lambda: [s for s in history(field)["steps"] if (s["step"], s["target"]) == ("bring back", "web")],
        "web to be told",
    )
    assert step["detail"] == "told"


def test_a_stop_of_one_instance_keeps_the_others_from_being_told_of_nothing(field: Field) -> None:
    # The second target has not answered yet, so that recovery takes the files back.
    field.start("web", "db", defaults='[defaults.patch]\nack_timeout = "1m"', each={"web": "instances = 2"})
    field.behave("db", reload="never")

    def all_say(text: str) -> bool:
        return all(text in i["status_text"] for i in field.target("web")["instances"])

    with killed_during(field, field.package("web", "db", probation=30.0), "build=300 a.txt=new-a"):
        wait_for(lambda: all_say("build=300 a.txt=new-a"), "both to take it up")
        wait_for(lambda: field.steps().count("reload") == 2, "both answers")
        field.behave("web", start="mute")
        end_process(field.target("web")["instances"][0]["pid"])
        wait_for(lambda: field.instance("web")["state"] == "starting", "the other one to start")
    wait_for(lambda: field.target("web")["busy"] == "recovery", "recovery to wait for it")
    field.client.call("stop", names=["web:0"])
    wait_for(
        lambda: "build=200 a.txt=old-a" in field.target("web")["instances"][1]["status_text"],
        "the one that runs on to be told",
    )


def test_who_is_starting_when_another_is_stopped_is_told_when_it_listens(field: Field) -> None:
    field.start(
        "web", "db", defaults='[defaults.patch]\nack_timeout = "1m"', each={"web": "instances = 3"},
        start_timeout="100s",
    )  # fmt: skip
    field.behave("db", reload="never")

    def says(index: int, text: str) -> bool:
        return text in field.target("web")["instances"][index]["status_text"]

    with killed_during(field, field.package("web", "db", probation=30.0), "build=300 a.txt=new-a"):
        wait_for(lambda: all(says(index, "build=300 a.txt=new-a") for index in range(3)), "all to take it up")
        field.behave("web", start="mute")
        end_process(field.target("web")["instances"][0]["pid"])
        wait_for(lambda: field.instance("web")["state"] == "starting", "the first one to start")
    wait_for(lambda: field.target("web")["busy"] == "recovery", "recovery to wait for it")
    field.client.call("stop", names=["web:1"])
    wait_for(lambda: says(2, "build=200 a.txt=old-a"), "the one that ran on to be told")
    wait_for(lambda: field.target("web")["busy"] == "recovery", "recovery to wait for the first once more")
    field.behave("web")
    wait_for(lambda: says(0, "build=200 a.txt=old-a"), "the first to be told")


def test_a_program_that_a_patch_had_started_is_started_anew_on_the_old_files(field: Field) -> None:
    field.start("web", "db", start_timeout="60s")
    field.behave("db", start="mute", version="two")
    with killed_during(
        field, field.package("web", "db", kind=Kind.COLD, probation=30.0), "two build=300 a.txt=new-a"
    ):
        new = field.instance("web")["pid"]
    for name in ("web", "db"):
        field.said(name, "one build=200 a.txt=old-a")
    assert field.instance("web")["pid"] != new
    ended(field, "rolled_back")


@pytest.mark.parametrize("kind", [Kind.WARM, Kind.COLD], ids=str)
def test_the_probation_of_a_patch_goes_on(field: Field, kind: Kind) -> None:
    field.fail_at("transaction.probation:hang")  # however long the kill takes, it is in time
    field.start("web")
    version = "two" if kind is Kind.COLD else "one"
    with killed_during(field, field.package("web", kind=kind, probation=2.0), f"{version} build=300"):
        on_probation(field)
        before = field.instance("web")["pid"]
    assert field.target("web")["busy"] == "patch"
    field.fail_at("")
    found = ended(field, "committed")
    assert found["error"] is None
    assert field.instance("web")["pid"] == before
    field.said("web", f"{version} build=300 a.txt=new-a")
    assert (
        field.apply(field.package("web", build=400, before={"a.txt": "new-a"}, files={"a.txt": "x"}))[
            "verdict"
        ]
        == "committed"
    )


def on_probation(field: Field) -> None:
    """Wait until it is written down that everybody has taken the patch up."""
    journal = field.folder / ".asyncsup/journal"
    wait_for(lambda: '"standing":[["web:0",' in journal.read_text(), "the probation")


def test_a_patch_that_waits_for_its_commit_goes_on_waiting(field: Field) -> None:
    field.start("web", patch='commit = "manual"')
    assert field.apply(field.package("web"))["verdict"] == "uncommitted"
    for way in ("kill_supervisor", "kill"):
        field.client.close()
        getattr(field.serve, way)()
        field.client = field.serve.connect() if way == "kill_supervisor" else field.serve.start()
        wait_for(lambda: field.target("web")["uncommitted"], "the patch to wait")
    txn = field.target("web")["uncommitted"]
    assert field.client.call("patch.commit", id=str(txn))["verdict"] == "committed"
    field.said("web", "build=300 a.txt=new-a")


def test_what_came_into_the_inbox_under_the_same_name_meanwhile_stays_there(field: Field) -> None:
    field.start("web", patch='commit = "manual"')
    field.drop(field.package("web"), "p.zip")
    assert field.client.call("patch.apply", name="p.zip")["verdict"] == "uncommitted"
    field.client.close()
    field.serve.kill_supervisor()
    field.client = field.serve.connect()
    wait_for(lambda: field.target("web")["uncommitted"], "the patch to wait")
    field.drop(another := field.package("web", build=400), "p.zip")
    field.client.call("patch.commit", id=str(field.target("web")["uncommitted"]))
    assert (field.serve.inbox / "p.zip").read_bytes() == another.read_bytes()
    assert not list(field.serve.inbox.glob("applied/*"))


def test_who_fell_while_nobody_was_there_has_failed_the_probation(field: Field) -> None:
    field.start("web", patch='commit = "manual"')
    assert field.apply(field.package("web"))["verdict"] == "uncommitted"
    pid = field.instance("web")["pid"]
    field.client.close()
    with nobody_there(field.serve):
        end_process(pid)
    field.client = field.serve.connect()
    ended(field, "rolled_back")
    field.said("web", "one build=200 a.txt=old-a")
    assert field.instance("web")["pid"] != pid


def test_a_target_that_a_patch_had_stopped_is_started_again(field: Field) -> None:
    """The supervisor dies between the stop and the switch."""
    field.start("web", "db")
    field.client.close()
    field.serve.stop()
    field.serve.alone = True
    field.serve.environ["ASYNCSUP_FAILPOINT"] = "transaction.switch:kill"
    field.client = field.serve.start()
    field.client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    with pytest.raises(AsyncsupError):
        field.apply(field.package("web", "db", kind=Kind.COLD))
    assert field.serve.process is not None
    assert field.serve.process.wait(60) == -signal.SIGKILL
    field.client.close()
    del field.serve.environ["ASYNCSUP_FAILPOINT"]
    field.client = field.serve.start()
    for name in ("web", "db"):
        field.said(name, "one build=200 a.txt=old-a")
    ended(field, "rolled_back")


def test_a_target_that_a_patch_was_stopping_is_started_again(field: Field) -> None:
    """The supervisor dies while the process still takes its time to end."""
    field.start("web", each={"web": 'stop_timeout = "1m"'})
    field.behave("web", stop="never")
    pid = field.instance("web")["pid"]
    with field.applying(field.package("web", kind=Kind.COLD)) as outcome:
        wait_for(lambda: field.instance("web")["state"] == "stopping", "the stop")
        field.client.close()
        field.serve.kill_supervisor()
        field.client = field.serve.connect()
    assert isinstance(outcome[0], AsyncsupError)
    assert field.instance("web")["state"] == "stopping"
    end_process(pid)
    field.behave("web")
    wait_for(lambda: field.instance("web")["pid"] not in {None, pid}, "another process")
    field.said("web", "one build=200 a.txt=old-a")
    ended(field, "rolled_back")
