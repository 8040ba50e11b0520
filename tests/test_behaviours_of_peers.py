"""What the test suites of other supervisors pin, as far as no other file here has it.

The table in `docs/design/0012-behaviours-of-peers.md` says which test is which of their behaviours.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Asked, Serve, alive, children_of, wait_for
from test_supervisor import IGNORES_TERM, QUICK, SLEEPER, fails, instance, reached, target

from asyncsup.child import SpawnSpec, group_members, spawn
from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError, SpawnError
from asyncsup.logfile import RotatingFile
from asyncsup.logs import OutputStream


def supervisor_pid(client: ControlClient) -> int:
    return int(client.call("supervisor.info")["pid"])


def descriptors(pid: int) -> set[int]:
    """Those of a process that has come to rest; some are open for a moment only."""

    def now() -> set[int]:
        return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}  # noqa: PTH208 - numbers are wanted

    def at_rest() -> set[int] | None:
        found = now()
        for _ in range(5):
            time.sleep(0.01)
            if now() != found:
                return None
        return found

    found: set[int] = wait_for(at_rest, f"process {pid} to rest")
    return found


def text_of(client: ControlClient, name: str) -> str:
    return str(client.call("logs", name=name)["chunks"][0]["text"])


def states_after(client: ControlClient, seq: int) -> list[tuple[str, str]]:
    events = client.call("events.since", seq=seq)["events"]
    return [(event["instance"], event["to"]) for event in events if event["type"] == "instance.state"]


@pytest.fixture
def doomed() -> Iterator[list[int]]:
    """Processes that are meant to outlive what started them."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- spawning -----------------------------------------------------------------------------------------------


def test_a_program_is_searched_for_in_its_own_path(serve: Serve) -> None:
    for folder in ("one", "two"):
        (serve.folder / folder).mkdir()
        program = serve.folder / folder / "greet"
        program.write_text(f"#!/bin/sh\necho {folder}\nexec sleep 3600\n")
        program.chmod(0o755)
    serve.environ = {"PATH": f"{serve.folder}/one:{os.environ['PATH']}"}
    client = serve.start(
        f'{QUICK}[target.inherits]\ncommand = "greet"\n'
        '[target.own]\ncommand = "greet"\nenv.PATH = "${here}/two:/usr/bin:/bin"\n'
    )
    wait_for(lambda: text_of(client, "inherits") == "one\n", "that of the supervisor's path")
    wait_for(lambda: text_of(client, "own") == "two\n", "that of its own path")
    client.close()


@pytest.mark.parametrize("by_descriptor", [False, True])
def test_a_supervisor_out_of_descriptors_says_so_and_recovers(serve: Serve, by_descriptor: bool) -> None:
    most = 10
    program = f"{SLEEPER}autostart = false\nlog.stderr = 'separate'\n"
    if by_descriptor:
        program = program.replace("sleep 3600", "sh -c 'echo >&7; exec sleep 3600'") + "ready.fd = 7\n"
    targets = "".join(f"[target.t{number}]\n{program}" for number in range(most))
    client = serve.start(f'{QUICK}restart = "never"\n{targets}')
    pid = supervisor_pid(client)
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    costs, refused = set(), 0
    for number in range(most):
        name = f"t{number}"
        before = descriptors(pid)
        # So many numbers are left to be had.
        free = [fd for fd in range(1000) if fd not in before]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[number], usual[1]))
        try:
            client.call("start", names=[name])
        except RemoteError as error:
            refused += 1
            assert "Too many open files" in error.message
            assert instance(client, name)["state"] == "failed"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
        client.call("start", names=[name])
        client.call("stop", names=[name])
        costs.add(len(descriptors(pid)) - len(before))
    # Above the limit there is no place for the program's descriptor, however many are free.
    assert refused == most if by_descriptor else 2 < refused < most
    assert len(costs) == 1, "a start that failed has left descriptors behind"
    client.close()


@pytest.mark.parametrize("adopted", [False, True])
def test_an_exit_while_there_are_no_descriptors_is_seen_to(serve: Serve, adopted: bool) -> None:
    program = 'command = ["sh", "-c", "sleep 3600 & exec sleep 3601"]\n'
    # If the group is found empty at once, the next start fails for want of descriptors, and is tried again.
    client = serve.start(f"{QUICK}[target.web]\n{program}start_limit_burst = 10_000\n")
    main = reached(client, "web", "running")["pid"]
    if adopted:
        client.close()
        serve.kill_supervisor()
        client = serve.connect()
    pid = supervisor_pid(client)
    wait_for(lambda: len(group_members(main)) == 2, "the other process")
    usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    free = min(set(range(1000)) - descriptors(pid))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, usual[1]))
    try:
        os.kill(main, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{main}").exists(), "it to be reaped")
        assert instance(client, "web")["pid"] in {main, None}
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
    wait_for(lambda: instance(client, "web")["restarts"] > 0, "another process")
    assert reached(client, "web", "running")["pid"] not in {main, None}
    assert not group_members(main)
    client.close()


def started_by(serve: Serve, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `serve` executed by a piece of Python that has `resource` and `os` and prepares the process."""
    command = serve.command
    text = f"import os, resource, sys\n{program}\nos.execv(sys.argv[1], sys.argv[1:])"
    monkeypatch.setattr(serve, "command", lambda *words: [sys.executable, "-c", text, *command(*words)])


SOFT_64 = "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"


@pytest.mark.parametrize("alone", [False, True], ids=["keeper", "no keeper"])
def test_the_soft_limit_of_descriptors_is_the_programs_and_not_the_supervisors(
    serve: Serve, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve.alone = alone
    started_by(serve, SOFT_64, monkeypatch)
    client = serve.start(
        f"{QUICK}[socket.http]\nlisten = 'unix://{serve.folder}/http.sock'\n"
        f"[target.web]\n{SLEEPER}instances = 40\nlog.stderr = 'separate'\nsockets = ['http']\n"
        f"[target.beyond]\n{SLEEPER}autostart = false\nready.fd = 64\n"
    )
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    pids = {i["pid"] for i in target(client, "web")["instances"]}
    assert len(pids) == 40
    assert max(descriptors(supervisor_pid(client))) > 64

    def limits() -> set[int]:
        return {resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] for pid in pids}

    assert limits() == {64}
    with pytest.raises(RemoteError, match="descriptor 64 is beyond the soft limit of 64"):
        client.call("start", names=["beyond"])
    started = client.call("supervisor.info")["started"]
    if alone:
        client.call("supervisor.reexec")
    else:
        serve.kill_supervisor()
    client.close()
    client = serve.connect_to_next(started)
    assert {i["pid"] for i in target(client, "web")["instances"]} == pids, "all are taken back"
    client.call("restart", names=["web"])
    pids = {i["pid"] for i in target(client, "web")["instances"]}
    assert limits() == {64}
    client.close()


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 3000, reason="needs so many descriptors")
def test_a_keeper_with_more_descriptors_than_select_knows_is_understood(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    hard += "resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))\n"
    started_by(serve, f"{hard}for number in range(3, 1100): os.dup2(0, number)", monkeypatch)
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    before = reached(client, "web", "running")["pid"]
    started = client.call("supervisor.info")["started"]
    client.close()
    serve.kill_supervisor()
    client = serve.connect_to_next(started)
    assert instance(client, "web")["pid"] == before
    client.close()


RUN = """
import os, resource, sys
from pathlib import Path
from asyncsup.child import SpawnSpec, spawn
from asyncsup.errors import RemoteError, SpawnError

def run(*command, **settings):
    settings |= {"directory": Path("/"), "env": dict(os.environ), "stdout": 1, "stderr": 2}
    child = spawn(SpawnSpec(command=command, **settings))
    return os.waitid(os.P_PID, child.pid, os.WEXITED).si_status
"""


def script(text: str) -> str:
    command = [sys.executable, "-c", RUN + text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_process_to_be_had_is_an_error_of_that_start() -> None:
    said = script(
        "before = os.listdir('/proc/self/fd')\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
        "try: run('sleep', '1')\n"
        "except SpawnError as error: print(error.message)\n"
        "assert os.listdir('/proc/self/fd') == before\n"
    )
    assert said == "sleep: cannot be started: Resource temporarily unavailable\n"


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ({"user": "no-such-user"}, "there is no user no-such-user any more"),
        ({"user": "4294967290"}, "there is no user 4294967290 any more"),
        ({"user": "no-such-user", "group": "root"}, "there is no user no-such-user any more"),
        ({"group": "no-such-group"}, "there is no group no-such-group any more"),
    ],
)
def test_a_user_that_has_vanished_is_named_and_nothing_runs(
    tmp_path: Path, who: dict[str, str], said: str
) -> None:
    spec = SpawnSpec(command=["touch", "ran"], directory=tmp_path, env={}, stdout=1, stderr=2, **who)  # type: ignore[arg-type]
    with pytest.raises(SpawnError, match=said):
        spawn(spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", ["user='daemon'", "user='daemon', umask=0o027", "group='daemon'"])
def test_who_may_not_become_somebody_else_is_told_and_nothing_runs(settings: str) -> None:
    """The configuration is checked for it, but privileges may have been given up since."""
    said = script(
        "import grp, pwd\n"  # as long as the interpreter's files can be read
        "if os.geteuid() == 0:\n"
        "    os.setgroups([])\n"
        "    os.setresgid(65534, 65534, 65534)\n"
        "    os.setresuid(65534, 65534, 65534)\n"
        "os.dup2(1, 2)\n"
        f"print('exit status', run('echo', 'it runs', {settings}))\n"
    )
    assert said.startswith("setpriv: setres")
    assert said.endswith("id failed: Operation not permitted\nexit status 127\n")


def test_a_umask_that_is_not_configured_is_the_supervisors() -> None:
    said = script("os.umask(0o137)\nrun('sh', '-c', 'umask')\nrun('sh', '-c', 'umask', umask=0o022)\n")
    assert said == "0137\n0022\n"


@pytest.mark.parametrize("group", [None, "daemon"])
def test_a_user_has_its_groups_and_nobody_elses(group: str | None) -> None:
    said = script(
        "os.setgroups([0, 4, 24])\n"
        "show = 'id -un; id -gn; grep -e ^Groups: -e ^Uid: /proc/self/status'\n"
        f"run('sh', '-c', show, user='nobody', group={group!r})"
    )
    user, main_group, uids, groups = said.splitlines()
    nobody = pwd.getpwnam("nobody")
    assert (user, main_group) == ("nobody", group or "nogroup")
    assert set(uids.split()[1:]) == {str(nobody.pw_uid)}
    assert {int(number) for number in groups.split()[1:]} == set(os.getgrouplist("nobody", nobody.pw_gid))


def test_the_environment_arrives_as_it_was_written(serve: Serve) -> None:
    inherited = "100% %(here)s 'single' \"double\" $HOME ${here} \\n é\ttab\nline"
    serve.environ = {"INHERITED": inherited, "MiXed": "case"}
    (serve.folder / "web.env").write_text("FILE=100% 'as it is' $HOME\n")
    client = serve.start(
        f"{QUICK}[target.web]\ncommand = ['{sys.executable}', '-c', "
        "'import json, os; print(json.dumps(dict(os.environ))); import time; time.sleep(3600)']\n"
        "env_files = ['web.env']\n"
        "[target.web.env]\nPERCENT = '100% %s %(x)s'\nQUOTES = '''a 'b' \"c\" \\d é'''\n"
        "DOLLAR = '$$HOME'\nMIXED = 'other case'\nEMPTY = ''\n"
    )
    found = json.loads(wait_for(lambda: text_of(client, "web"), "the environment"))
    assert found["INHERITED"] == inherited
    assert (found["MiXed"], found["MIXED"], found["EMPTY"]) == ("case", "other case", "")
    assert found["PERCENT"] == "100% %s %(x)s"
    assert found["QUOTES"] == "a 'b' \"c\" \\d é"
    assert found["DOLLAR"] == "$HOME"
    assert found["FILE"] == "100% 'as it is' $HOME"
    client.close()


# --- states -------------------------------------------------------------------------------------------------


def test_what_is_so_already_is_not_done_again(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.up]\n{SLEEPER}[target.down]\n{SLEEPER}autostart = false\n")
    client.call("wait", {"names": ["up"], "for": "ready", "timeout": 60})
    pid, seq = instance(client, "up")["pid"], client.call("status")["seq"]
    for _ in range(3):
        client.call("start", names=["up"])
        client.call("stop", names=["down"])
    assert instance(client, "up")["pid"] == pid
    assert states_after(client, seq) == []
    client.close()


@pytest.mark.parametrize("policy", ["on-failure", "always"])
def test_an_end_before_it_was_ready_is_a_failure_whatever_its_status(serve: Serve, policy: str) -> None:
    client = serve.start(
        f'{QUICK}restart = "{policy}"\nstart_limit_burst = 2\n[target.app]\n{SLEEPER}depends_on = ["db"]\n'
        '[target.db]\ncommand = "true"\nprotocol = "notify"\n'
    )
    found = reached(client, "db", "failed")
    assert "ended before it was ready" in found["exit"]["reason"]
    assert found["exit"]["status"] == 0
    assert found["restarts"] == 2
    assert instance(client, "app")["state"] == "waiting"
    assert "before it was ready" in fails(client, "start", names=["db"]).message
    client.close()


def test_nothing_is_started_while_the_supervisor_is_stopping(serve: Serve) -> None:
    client = serve.start(
        f'{QUICK}[target.deaf]\n{IGNORES_TERM}stop_timeout = "1h"\nrestart = "always"\n'
        f"[target.lazy]\n{SLEEPER}autostart = false\n"
        '[target.bad]\ncommand = "false"\nstart_limit_interval = "0s"\nrestart_max_delay = "20ms"\n'
    )
    wait_for(lambda: "up" in text_of(client, "deaf"), "the program")
    client.call("shutdown")
    reached(client, "deaf", "stopping")
    reached(client, "bad", "stopped")
    for method in ("start", "restart"):
        for name in ("lazy", "deaf", "bad"):
            assert fails(client, method, names=[name]).error_code == "supervisor.shutting_down"
    assert fails(client, "scale", name="lazy", instances=3).error_code == "supervisor.shutting_down"
    # One that dies of something else is not started again either.
    os.kill(instance(client, "deaf")["pid"], signal.SIGKILL)
    assert serve.process is not None
    assert serve.process.wait(60) == 0
    client.close()
    after = serve.errors().partition(" stopping (")[2]
    assert "deaf:0: stopping -> stopped" in after
    assert "stopped -> " not in after


@pytest.mark.parametrize("half", ["stopping", "starting"])
def test_a_stop_during_a_restart_is_the_last_word(serve: Serve, half: str) -> None:
    # It hears no SIGTERM, and comes up no second time.
    (serve.folder / "may-come-up").touch()
    (serve.folder / "deaf.sh").write_text("trap '' TERM\necho $$ >> starts\nwhile :; do sleep 3600; done\n")
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = "sh deaf.sh"\nstop_timeout = "1h"\nstart_timeout = "1h"\n'
        'ready.exec = ["sh", "-c", "test -e may-come-up && test -s starts"]\n'
    )
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    first = instance(client, "web")["pid"]
    restart = Asked(serve.endpoint, "restart", names=["web"])
    assert reached(client, "web", "stopping")["pid"] == first
    if half == "starting":
        (serve.folder / "may-come-up").unlink()
        os.killpg(first, signal.SIGKILL)
        reached(client, "web", "starting")
        wait_for(lambda: (serve.folder / "starts").read_text().count("\n") == 2, "the second process")
    last = instance(client, "web")["pid"]
    assert (last == first) is (half == "stopping")
    stop = Asked(serve.endpoint, "stop", names=["web"])
    wait_for(lambda: target(client, "web")["busy"] == "stop", "the stop to be the one that counts")
    reached(client, "web", "stopping")
    os.killpg(last, signal.SIGKILL)
    stop.result()
    assert isinstance(restart.answer(), RemoteError), "it was not restarted, and is said to be"
    assert instance(client, "web")["state"] == "stopped"
    client.close()
    assert serve.stop() == 0
    assert serve.errors().count("web:0: stopped -> starting") == (1 if half == "stopping" else 2)


def test_restarts_while_a_dependency_is_waited_for_double_nothing(serve: Serve) -> None:
    program = "command = ['sh', '-c', 'echo $$$$ >> starts; exec sleep 3600']\n"
    client = serve.start(f'{QUICK}[target.db]\n{SLEEPER}[target.web]\n{program}depends_on = ["db"]\n')

    def pids() -> list[int]:
        starts = serve.folder / "starts"
        return [int(line) for line in starts.read_text().split()] if starts.exists() else []

    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    wait_for(pids, "the first process to say so")
    client.call("stop", names=["db"])
    asked = [Asked(serve.endpoint, "restart", names=["web"]) for _ in range(3)]
    assert reached(client, "web", "waiting")["detail"] == "waiting for db"
    client.call("start", names=["db"])
    for each in asked:
        each.result()
    wait_for(lambda: target(client, "web")["busy"] is None, "the last of them to be over")
    wait_for(lambda: pids()[-1] == instance(client, "web")["pid"], "the last process to say so")
    found = pids()
    assert [pid for pid in found if alive(pid)] == [found[-1]]
    assert 2 <= len(found) <= 4, "the first one, and at most one for each restart"
    client.close()


def test_kill_mode_process_leaves_its_children_alone(serve: Serve, doomed: list[int]) -> None:
    (serve.folder / "tree.sh").write_text("sleep 3600 &\necho child $!\nwait\n")
    client = serve.start(f'{QUICK}[target.tree]\ncommand = "sh tree.sh"\nkill_mode = "process"\n')
    child = int(wait_for(lambda: text_of(client, "tree"), "the child").split()[1])
    doomed.append(child)
    leader = instance(client, "tree")["pid"]
    client.call("stop", names=["tree"])
    assert instance(client, "tree")["state"] == "stopped"
    assert not alive(leader)
    assert alive(child)
    client.close()


def test_a_signal_to_what_does_not_run_says_so(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.up]\n{SLEEPER}[target.down]\n{SLEEPER}autostart = false\n")
    client.call("wait", {"names": ["up"], "for": "ready", "timeout": 60})
    error = fails(client, "signal", names=["down"], signal="USR1")
    assert (error.error_code, error.remote_exit_status) == ("target.not_running", 3)
    assert "down has no process to signal" in error.message
    assert fails(client, "signal", names=["up", "down"], signal="WINCH").error_code == "target.not_running"
    assert fails(client, "signal", names=["nobody"], signal="WINCH").error_code == "target.not_found"
    assert instance(client, "up")["state"] == "running"
    client.close()


BACKWARDS = """
import itertools, time
hours = itertools.count(1)
real, start = time.time, time.time()
time.time = lambda: start - 3600 * next(hours)
"""


def test_the_time_of_day_decides_nothing_about_processes(serve: Serve) -> None:
    # A supervisor that is told an earlier time whenever it asks.
    (serve.folder / "sitecustomize.py").write_text(BACKWARDS)
    serve.environ = {"PYTHONPATH": str(serve.folder)}
    client = serve.start(
        f'{QUICK}[target.web]\n{SLEEPER}[target.bad]\ncommand = "false"\nstart_limit_burst = 3\n'
        f'[target.deaf]\n{IGNORES_TERM}stop_timeout = "200ms"\n'
    )
    client.call("wait", {"names": ["web", "deaf"], "for": "ready", "timeout": 60})
    assert reached(client, "bad", "failed")["restarts"] == 3
    pid = instance(client, "web")["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: instance(client, "web")["pid"] not in {pid, None}, "a new process")
    client.call("stop", names=["deaf"])
    assert instance(client, "web")["uptime"] >= 0
    client.close()
    assert serve.stop() == 0


def test_waiting_is_said_once(serve: Serve) -> None:
    client = serve.start(
        f'{QUICK}[target.db]\n{SLEEPER}protocol = "notify"\nstart_timeout = "1h"\n'
        f'[target.app]\n{SLEEPER}depends_on = ["db"]\n[target.deaf]\n{IGNORES_TERM}stop_timeout = "1h"\n'
    )
    wait_for(lambda: "up" in text_of(client, "deaf"), "the program")
    assert instance(client, "app")["detail"] == "waiting for db"
    for _ in range(3):
        client.call("start", names=["app"], wait=False)
    client.call("shutdown")
    found = reached(client, "deaf", "stopping")
    assert serve.process is not None
    assert serve.process.poll() is None
    os.kill(found["pid"], signal.SIGKILL)
    assert serve.process.wait(60) == 0
    client.close()
    assert serve.errors().count("waiting for db") == 1
    assert serve.errors().count("deaf:0: running -> stopping") == 1


def test_restarts_by_command_are_no_flapping(serve: Serve) -> None:
    client = serve.start(
        '[defaults]\nstart_limit_burst = 1\nrestart_delay = "20ms"\nmin_uptime = "1h"\n'
        f"[target.web]\n{SLEEPER}"
    )
    client.call("wait", {"names": ["web"], "for": "running", "timeout": 60})
    for _ in range(5):
        client.call("restart", names=["web"], wait=False)
    wait_for(lambda: not target(client, "web")["busy"] and not target(client, "web")["waiting"], "the last")
    pid = wait_for(lambda: instance(client, "web")["pid"], "a process")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: instance(client, "web")["pid"] not in {pid, None}, "a new process")
    os.kill(instance(client, "web")["pid"], signal.SIGKILL)
    assert "gave up after 1 restarts" in reached(client, "web", "failed")["detail"]
    client.call("start", names=["web"], wait=False)
    wait_for(lambda: instance(client, "web")["pid"], "that of a start by command")
    client.close()


def test_who_has_left_the_group_does_not_hold_up_a_stop(serve: Serve, doomed: list[int]) -> None:
    """It still has the output, which never comes to its end."""
    (serve.folder / "tree.sh").write_text("setsid sleep 3600 &\necho child $!\nexec sleep 3600\n")
    client = serve.start(f'{QUICK}[target.tree]\ncommand = "sh tree.sh"\n')
    doomed.append(int(wait_for(lambda: text_of(client, "tree"), "the child").split()[1]))
    client.call("stop", names=["tree"])
    assert instance(client, "tree")["state"] == "stopped"
    client.call("start", names=["tree"])
    doomed.append(int(wait_for(lambda: text_of(client, "tree").splitlines()[1:], "the second")[0].split()[1]))
    client.close()
    assert serve.stop() == 0


# --- the supervisor itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_stop_everything(serve: Serve, number: signal.Signals) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    pid = instance(client, "web")["pid"]
    client.close()
    assert serve.process is not None
    serve.process.send_signal(number)
    assert serve.process.wait(60) == 0
    assert not alive(pid)


def test_usr2_reopens_the_logs(serve: Serve) -> None:
    os.mkfifo(serve.folder / "pipe")
    client = serve.start(
        f"{QUICK}[target.web]\ncommand = ['sh', '-c', 'while read -r line; do echo \"$line\"; done < pipe']\n"
    )
    log = serve.folder / ".asyncsup/logs/web.0.log"
    with (serve.folder / "pipe").open("w") as pipe:
        pipe.write("old\n")
        pipe.flush()
        wait_for(lambda: log.exists() and log.read_text() == "old\n", "the first line")
        log.rename(log.with_name("moved"))
        os.kill(supervisor_pid(client), signal.SIGUSR2)
        wait_for(lambda: "reopening" in serve.errors(), "the signal")
        pipe.write("new\n")
        pipe.flush()
        wait_for(lambda: log.exists() and log.read_text() == "new\n", "the new file")
        assert log.with_name("moved").read_text() == "old\n"
        log.unlink()
        os.kill(supervisor_pid(client), signal.SIGUSR2)
        wait_for(lambda: serve.errors().count("reopening") == 2, "the signal")
        pipe.write("newest\n")
        pipe.flush()
        wait_for(lambda: log.exists() and log.read_text() == "newest\n", "a file in place of the removed one")
        client.call("stop", names=["web"])
    client.close()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGPIPE, signal.SIGWINCH, signal.SIGCONT])
def test_signals_without_a_meaning_end_nothing(serve: Serve, number: signal.Signals) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    pid = instance(client, "web")["pid"]
    os.kill(supervisor_pid(client), number)
    assert instance(client, "web")["pid"] == pid
    client.close()
    assert serve.stop() == 0


def test_leftovers_of_another_supervisor_are_tolerated(serve: Serve) -> None:
    run = serve.folder / ".asyncsup/run"
    run.mkdir(mode=0o700, parents=True)
    (run / "lock").write_bytes(b"\xff\xfe no pid\n" * 100)
    for name in ("control.sock", "events.sock", "target.sock", "notify.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(run / name))
    (run / "output").mkdir()
    (run / "output/web:0.stdout").write_text("no FIFO")
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    client.close()
    assert serve.stop() == 0
    # Somebody else has the lock, and nobody knows who.
    with (run / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(b"\xff\xfe no pid\n")
        lock.flush()
        second = subprocess.run(serve.command(), capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 8
    assert "another supervisor (pid unknown) runs" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.parametrize("removed_before", [False, True])
def test_sockets_go_at_the_end_and_may_have_gone_before(serve: Serve, removed_before: bool) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    client.close()
    sockets = list((serve.folder / ".asyncsup/run").glob("*.sock"))
    assert len(sockets) == 4
    if removed_before:
        for path in sockets:
            path.unlink()
    assert serve.stop() == 0
    assert not any(path.exists() for path in sockets)


def test_shutdown_without_a_supervisor_says_that_there_is_none(serve: Serve) -> None:
    serve.write(f"[target.web]\n{SLEEPER}")
    command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "shutdown"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 7
    assert done.stderr.startswith(f"asyncsup: no supervisor at {serve.endpoint}")


# --- output -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_file_is_full_at_its_size_and_missing_ones_are_tolerated(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    file = RotatingFile(logs / "out.log", max_size=10, max_files=4)
    stream = OutputStream(tmp_path / "fifo", file, instance="a:0", stream="stdout", format_="raw")
    output = stream.open_child_end()

    def write(line: bytes) -> None:
        os.write(output, line)
        stream.drain()

    def found() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in logs.iterdir()}

    write(b"123456789\n")
    assert found() == {"out.log": b"123456789\n"}
    write(b"a\n")
    assert found() == {"out.log": b"a\n", "out.log.1": b"123456789\n"}
    write(b"b\n")
    (logs / "out.log.1").unlink()
    write(b"1234567\n")
    assert found() == {"out.log": b"1234567\n", "out.log.1": b"a\nb\n"}
    (logs / "out.log").unlink()
    write(b"1234567\n")
    os.close(output)
    stream.close()
    file.close()
    assert found() == {"out.log": b"1234567\n", "out.log.2": b"a\nb\n"}


def test_streams_go_on_after_a_stop_and_a_start(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.web]\ncommand = ['sh', '-c', 'echo $$$$; exec sleep 3600']\nautostart = false\n"
    )
    assert text_of(client, "web") == ""
    cursor = client.call("logs", name="web")["chunks"][0]["cursor"]
    followed = ""
    for _ in range(3):
        client.call("start", names=["web"])
        said = f"{instance(client, 'web')['pid']}\n"
        while not followed.endswith(said):
            (chunk,) = client.call("logs.follow", cursors=[cursor])["chunks"]
            followed, cursor = followed + chunk["text"], chunk["cursor"]
        client.call("stop", names=["web"])
    assert len(followed.splitlines()) == 3
    assert text_of(client, "web") == followed
    client.close()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ("log.stdout = '/dev/null'\n", []),
        ("log.stdout = '/dev/null'\nlog.stderr = 'separate'\n", ["web.0.err.log"]),
        ("log.stderr = '/dev/null'\n", ["web.0.log"]),
    ],
    ids=["both", "output", "errors"],
)
def test_output_may_go_nowhere(serve: Serve, settings: str, kept: list[str]) -> None:
    """More than a pipe holds: the program would stand still if nobody took it."""
    (serve.folder / "talk.sh").write_text(
        "head -c 3000000 /dev/zero\nhead -c 3000000 /dev/zero >&2\ntouch done\nexec sleep 3600\n"
    )
    client = serve.start(f'{QUICK}[target.web]\ncommand = "sh talk.sh"\n{settings}')
    wait_for((serve.folder / "done").exists, "everything to be written")
    client.call("stop", names=["web"])
    logs = serve.folder / ".asyncsup/logs"
    assert [(path.name, path.stat().st_size) for path in logs.glob("*")] == [(name, 3000000) for name in kept]
    assert Path("/dev/null").is_char_device()
    if "web.0.log" not in kept:
        assert text_of(client, "web") == ""
    client.close()


@pytest.mark.parametrize("options", [["-f"], ["-f", "--json"], ["-n", "20000"]])
def test_a_reader_of_logs_that_goes_away_ends_them_quietly(serve: Serve, options: list[str]) -> None:
    (serve.folder / "talk.sh").write_text(
        "yes 'a line that is long enough' | head -n 20000\n"
        "while :; do echo 'a line that is long enough'; sleep 0.1; done\n"
    )
    client = serve.start(f"{QUICK}[target.web]\ncommand = 'sh talk.sh'\n")
    log = serve.folder / ".asyncsup/logs/web.0.log"
    wait_for(lambda: log.exists() and log.stat().st_size > 500_000, "more than a pipe holds")
    command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "logs", *options, "web"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        try:
            assert b"a line that is long enough" in follower.stdout.readline()
            follower.stdout.close()
            assert follower.wait(60) == 0
            assert follower.stderr.read() == b""
        finally:
            follower.kill()
    assert instance(client, "web")["state"] == "running"
    client.close()


def test_bytes_that_are_no_text_are_passed_on(serve: Serve) -> None:
    (serve.folder / "said").write_bytes(b"caf\xc3\xa9 \xff\xfe\0\n")
    client = serve.start(f"{QUICK}[target.web]\ncommand = ['sh', '-c', 'cat said; exec sleep 3600']\n")
    assert wait_for(lambda: text_of(client, "web"), "the output") == "café \ufffd\ufffd\0\n"
    assert (serve.folder / ".asyncsup/logs/web.0.log").read_bytes() == b"caf\xc3\xa9 \xff\xfe\0\n"
    command: list[Any] = [sys.executable, "-m", "asyncsup", "-c", serve.config, "logs", "web"]
    shown = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert shown.decode() == "café \ufffd\ufffd\0\n"
    client.close()


def test_strays_are_reaped_without_a_keeper_as_well(serve: Serve) -> None:
    serve.alone = True
    program = 'command = ["sh", "-c", "(sleep 0.1 &) ; exec sleep 3600"]'
    client = serve.start(f'[defaults]\nmin_uptime = "50ms"\n\n[target.web]\n{program}\ninstances = 5\n')

    def instances() -> set[int]:
        return {int(i["pid"]) for i in client.call("status")["targets"][0]["instances"] if i["ready"]}

    running = wait_for(lambda: len(instances()) == 5 and instances(), "five instances")
    wait_for(
        lambda: set(children_of(serve.supervisor)) == running, "the supervisor to have no other children"
    )
    client.close()
