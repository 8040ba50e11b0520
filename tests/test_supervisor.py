"""A real supervisor with real children, seen through the control socket."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Asked, Serve, alive, wait_for

from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError, TimeoutExpiredError

QUICK = '[defaults]\nmin_uptime = "20ms"\nrestart_delay = "20ms"\nstop_timeout = "5s"\n'
SLEEPER = 'command = "sleep 3600"\n'


def target(client: ControlClient, name: str) -> Any:
    return client.call("status", names=[name])["targets"][0]


def instance(client: ControlClient, name: str) -> Any:
    return target(client, name)["instances"][0]


def reached(client: ControlClient, name: str, state: str) -> Any:
    return wait_for(
        lambda: instance(client, name) if instance(client, name)["state"] == state else None,
        f"{name} {state}",
    )


def group(leader: int) -> list[int]:
    """The members of a process group, zombies included."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == leader:
                    pids.append(int(entry.name))
    return pids


@contextlib.contextmanager
def no_room(supervisor: int) -> Iterator[None]:
    """For the block, the supervisor cannot write to files any more, as if the disk were full."""
    before = resource.prlimit(supervisor, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(supervisor, resource.RLIMIT_FSIZE, before)


def fails(client: ControlClient, method: str, /, **params: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        client.call(method, params)
    return caught.value


def test_start_stop_restart(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.web]\n{SLEEPER}instances = 2\n[target.lazy]\n{SLEEPER}autostart = false\n"
    )
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    web = target(client, "web")
    assert [i["state"] for i in web["instances"]] == ["running", "running"]
    assert web["ready"]
    assert web["wanted"] == "up"
    assert target(client, "lazy")["state"] == "stopped"

    client.call("start", names=["lazy"])
    assert instance(client, "lazy")["ready"]

    before = [i["pid"] for i in web["instances"]]
    client.call("restart", names=["web:1"])
    after = [i["pid"] for i in target(client, "web")["instances"]]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert not alive(before[1])

    client.call("stop", names=["web", "lazy"])
    assert [t["state"] for t in client.call("status")["targets"]] == ["stopped", "stopped"]
    assert not any(alive(pid) for pid in after)
    client.close()


def test_a_crash_is_followed_by_a_restart_at_once_and_counted(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    pid = instance(client, "web")["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: instance(client, "web")["pid"] not in {pid, None}, "a new process")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    found = instance(client, "web")
    assert found["restarts"] == 1
    assert found["exit"]["signal"] == 9
    assert found["exit"]["reason"] == "killed by SIGKILL"
    client.close()


@pytest.mark.parametrize("operation", ["stop", "restart", "reload"])
def test_who_does_not_want_to_wait_is_answered_at_once(serve: Serve, operation: str) -> None:
    (serve.folder / "slow.sh").write_text(
        "trap '' TERM\ntouch deaf\nuntil [ -e go ]; do sleep 0.02; done\ntouch ended\n"
    )
    (serve.folder / "reload.sh").write_text("until [ -e go ]; do sleep 0.02; done\ntouch ended\n")
    client = serve.start(
        f'{QUICK}[target.web]\ncommand = "sh slow.sh"\nstop_timeout = "5m"\nreload_command = "sh reload.sh"\n'
    )
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    wait_for((serve.folder / "deaf").exists, "the program not to listen")
    (result,) = client.call(operation, {"names": ["web"], "wait": False}, timeout=60)["results"]
    assert (result["ok"], result["detail"]) == (True, "begun")
    assert not (serve.folder / "ended").exists()
    wait_for(lambda: target(client, "web")["busy"] == operation, "it to go on")
    (serve.folder / "go").touch()
    wait_for((serve.folder / "ended").exists, "the end of it")
    wait_for(lambda: target(client, "web")["busy"] is None, "the end of the operation")
    client.close()


def test_a_program_that_ends_at_once_backs_off_and_then_fails(serve: Serve) -> None:
    client = serve.start(
        f'{QUICK}[target.bad]\ncommand = "sh -c \'exit 3\'"\nmin_uptime = "1h"\nstart_limit_burst = 3\n'
    )
    found = reached(client, "bad", "failed")
    assert found["restarts"] == 3
    assert found["exit"]["status"] == 3
    assert "gave up after 3 restarts" in found["detail"]
    error = fails(client, "start", names=["bad"])
    assert error.error_code == "target.start_failed"
    assert "exit status 3" in error.message
    client.close()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("no-such-program", "command not found"),
        ("./plain", "is not executable"),
        ("./folder", "is a folder"),
    ],
)
def test_a_program_that_cannot_be_executed_is_said_and_harms_nobody_else(
    serve: Serve, command: str, says: str
) -> None:
    (serve.folder / "plain").write_text("#!/bin/sh\n")
    (serve.folder / "folder").mkdir()
    client = serve.start(f'{QUICK}[target.bad]\ncommand = "{command}"\n[target.good]\n{SLEEPER}')
    client.call("wait", {"names": ["good"], "for": "ready", "timeout": 60})
    assert says in wait_for(lambda: instance(client, "bad")["exit"], "the failure")["reason"]
    client.close()


def test_a_folder_that_disappears_is_named(serve: Serve) -> None:
    folder = serve.folder / "here"
    folder.mkdir()
    client = serve.start(f'{QUICK}[target.web]\n{SLEEPER}directory = "here"\nautostart = false\n')
    folder.rmdir()
    error = fails(client, "start", names=["web"])
    assert f"cannot be started in {folder}: " in error.message
    client.close()


IGNORES_TERM = (
    f'command = ["{sys.executable}", "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); '
    "print('up', flush=True); time.sleep(3600)\"]\n"
)


def test_stop_escalates_to_kill_after_the_timeout_and_not_before(serve: Serve) -> None:
    client = serve.start(f'{QUICK}[target.deaf]\n{IGNORES_TERM}stop_timeout = "300ms"\n')
    wait_for(lambda: "up" in client.call("logs", name="deaf")["chunks"][0]["text"], "the program")
    began = time.monotonic()
    client.call("stop", names=["deaf"])
    assert time.monotonic() - began >= 0.3
    assert instance(client, "deaf")["exit"]["signal"] == 9
    client.close()


def test_stop_means_the_whole_group_is_gone(serve: Serve) -> None:
    script = serve.folder / "tree.sh"
    script.write_text(
        "trap '' TERM\nsleep 3600 &\necho child $!\nsh -c 'trap \"\" TERM; sleep 3600' &\nexec sleep 3600\n"
    )
    client = serve.start(f'{QUICK}[target.tree]\ncommand = "sh tree.sh"\nstop_timeout = "300ms"\n')
    wait_for(lambda: "child" in client.call("logs", name="tree")["chunks"][0]["text"], "the children")
    leader = instance(client, "tree")["pid"]
    client.call("stop", names=["tree"])
    assert [pid for pid in group(leader) if alive(pid)] == []
    client.close()


def test_children_of_a_crashed_leader_are_ended_before_the_restart(serve: Serve) -> None:
    script = serve.folder / "tree.sh"
    script.write_text("sleep 3600 &\necho child $!\nwait\n")
    client = serve.start(f'{QUICK}[target.tree]\ncommand = "sh tree.sh"\n')
    client.call("wait", {"names": ["tree"], "for": "ready", "timeout": 60})
    text = wait_for(lambda: client.call("logs", name="tree")["chunks"][0]["text"], "the child")
    child, leader = int(text.split()[1]), instance(client, "tree")["pid"]
    os.kill(leader, signal.SIGKILL)
    wait_for(lambda: instance(client, "tree")["pid"] not in {leader, None}, "a new leader")
    assert not alive(child)
    client.close()


def test_stop_works_in_back_off(serve: Serve) -> None:
    client = serve.start('[target.bad]\ncommand = "false"\nrestart_delay = "1h"\nrestart_max_delay = "1h"\n')
    reached(client, "bad", "backoff")
    client.call("stop", names=["bad"])
    assert instance(client, "bad")["state"] == "stopped"
    assert target(client, "bad")["wanted"] == "down"
    client.close()


def test_stop_pre_empts_a_start_that_waits(serve: Serve) -> None:
    client = serve.start(
        f'[target.slow]\n{SLEEPER}protocol = "notify"\nautostart = false\nstart_timeout = "1h"\n'
    )
    errors: list[RemoteError] = []
    with ControlClient(serve.endpoint) as other:
        starting = threading.Thread(target=lambda: errors.append(fails(other, "start", names=["slow"])))
        starting.start()
        reached(client, "slow", "starting")
        assert target(client, "slow")["busy"] == "start"
        client.call("stop", names=["slow"])
        starting.join(60)
    assert errors[0].error_code == "request.cancelled"
    assert "asked to stop slow" in errors[0].message
    assert instance(client, "slow")["state"] == "stopped"
    client.close()


def test_a_client_that_gives_up_cancels_its_request(serve: Serve) -> None:
    client = serve.start(
        f'[target.slow]\n{SLEEPER}protocol = "notify"\nautostart = false\nstart_timeout = "1h"\n'
    )
    with pytest.raises(TimeoutExpiredError):
        client.call("start", {"names": ["slow"]}, timeout=0.2)
    wait_for(lambda: target(client, "slow")["busy"] is None, "the request to be gone")
    client.close()


def test_what_never_becomes_ready_is_ended_and_counts_as_a_failure(serve: Serve) -> None:
    client = serve.start(
        f'{QUICK}[target.mute]\n{SLEEPER}protocol = "notify"\nstart_timeout = "200ms"\n'
        "start_limit_burst = 1\n"
    )
    found = reached(client, "mute", "failed")
    assert "not ready within 0.2 s" in found["detail"]
    client.close()


NOTIFIES = """
import os, signal, socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
def say(text): s.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
def reload(*_):
    say("RELOADING=1")
    say("READY=1\\nSTATUS=reloaded")
signal.signal(signal.SIGHUP, reload)
say("EXTEND_TIMEOUT_USEC=60000000")
time.sleep(5.5)
say("READY=1\\nSTATUS=hello \\x1b[31m")
while True: time.sleep(3600)
"""


def test_sd_notify_ready_status_extend_and_reload(serve: Serve) -> None:
    (serve.folder / "notifies.py").write_text(NOTIFIES)
    client = serve.start(
        f'{QUICK}[target.unit]\ncommand = ["{sys.executable}", "notifies.py"]\nprotocol = "notify"\n'
        'start_timeout = "5s"\nreload_signal = "HUP"\n'
    )
    client.call("wait", {"names": ["unit"], "for": "ready", "timeout": 60})
    found = instance(client, "unit")
    assert found["status_text"].startswith("hello")
    # Ready at all: without more time each start is ended after 5 s, and it says READY=1 after 5.5 s.
    result = client.call("reload", names=["unit"])["results"][0]
    assert result["instances"][0]["told_by"] == "signal"
    assert wait_for(lambda: instance(client, "unit")["status_text"] == "reloaded", "the status")
    assert instance(client, "unit")["pid"] == found["pid"]
    client.close()


def test_reload_by_command_and_its_failure(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.good]\n{SLEEPER}reload_command = \"sh -c 'echo reloaded $MAINPID'\"\n"
        f"[target.bad]\n{SLEEPER}reload_command = \"sh -c 'exit 4'\"\n"
        f"[target.none]\n{SLEEPER}"
    )
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    client.call("reload", names=["good"])
    pid = instance(client, "good")["pid"]
    wait_for(lambda: f"reloaded {pid}" in client.call("logs", name="good")["chunks"][0]["text"], "its output")
    assert "exit status 4" in fails(client, "reload", names=["bad"]).message
    assert "set reload_signal or reload_command" in fails(client, "reload", names=["none"]).message
    assert instance(client, "bad")["state"] == "running"
    client.close()


def test_dependencies_start_first_and_stop_last(serve: Serve) -> None:
    ready = "import os,socket,time; time.sleep(0.3); socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)"
    ready += ".sendto(b'READY=1', os.environ['NOTIFY_SOCKET']); time.sleep(3600)"
    client = serve.start(
        f'{QUICK}[target.app]\n{SLEEPER}depends_on = ["db"]\n'
        f'[target.db]\ncommand = ["{sys.executable}", "-c", "{ready}"]\nprotocol = "notify"\n'
    )
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    events = client.call("events.since", seq=0)["events"]
    states = [(e["instance"], e["to"]) for e in events if e["type"] == "instance.state"]
    assert ("app:0", "waiting") in states
    assert states.index(("db:0", "running")) < states.index(("app:0", "starting"))
    client.call("shutdown")
    assert serve.process is not None
    assert serve.process.wait(60) == 0
    client.close()
    said = serve.errors()
    assert said.index("app:0: stopping -> stopped") < said.index("db:0: running -> stopping")


def test_term_stops_everything_and_ends_with_zero(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}instances = 5\n")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    pids = [i["pid"] for i in target(client, "web")["instances"]]
    client.close()
    assert serve.stop() == 0
    assert not any(alive(pid) for pid in pids)
    assert not (serve.folder / ".asyncsup/run/output/web:0.stdout").exists()


def test_a_second_term_does_not_wait(serve: Serve) -> None:
    client = serve.start(f'{QUICK}[target.deaf]\n{IGNORES_TERM}stop_timeout = "1h"\n')
    wait_for(lambda: "up" in client.call("logs", name="deaf")["chunks"][0]["text"], "the program")
    assert serve.process is not None
    serve.process.terminate()
    reached(client, "deaf", "stopping")
    serve.process.terminate()
    assert serve.process.wait(60) == 0
    client.close()


def test_a_second_supervisor_is_refused_and_told_who_is_there(serve: Serve) -> None:
    client = serve.start(f"[target.web]\n{SLEEPER}")
    second = subprocess.run(
        serve.command(),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 8
    assert serve.process is not None
    assert f"pid {serve.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert client.call("supervisor.info")["keeper"] == serve.process.pid
    client.close()


def test_an_essential_target_ends_the_supervisor_with_its_status(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.main]\n"
        "command = ['sh', '-c', 'until test -e go; do sleep 0.05; done; exit 17']\nessential = true\n"
        'restart = "never"\n'
        f"[target.side]\n{SLEEPER}"
    )
    (serve.folder / "go").touch()
    assert serve.process is not None
    assert serve.process.wait(60) == 17
    client.close()


def test_a_manual_stop_outlives_the_supervisor_when_asked_to(serve: Serve) -> None:
    text = (
        f'{QUICK}[target.a]\n{SLEEPER}restart = "unless-stopped"\n[target.b]\n{SLEEPER}restart = "always"\n'
    )
    client = serve.start(text)
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    client.call("stop", names=["a", "b"])
    client.close()
    serve.stop()
    client = serve.start()
    client.call("wait", {"names": ["b"], "for": "ready", "timeout": 60})
    assert instance(client, "a")["state"] == "stopped"
    client.call("start", names=["a"])
    client.close()
    serve.stop()
    client = serve.start()
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    client.close()


THREE = f'{QUICK}[target.web]\n{SLEEPER}instances = 3\nrestart = "unless-stopped"\n'


def states_of_the_next(serve: Serve, *up: str) -> list[str]:
    """End the supervisor in order, start another, and wait for these instances; the states of all."""
    assert serve.stop() == 0
    with serve.start() as client:
        client.call("wait", {"names": list(up), "for": "ready", "timeout": 60})
        return [each["state"] for each in target(client, "web")["instances"]]


def test_a_manual_stop_of_one_instance_outlives_the_supervisor_too(serve: Serve) -> None:
    with serve.start(THREE) as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        client.call("stop", names=["web:1"])
    assert states_of_the_next(serve, "web:0", "web:2") == ["running", "stopped", "running"]
    with serve.connect() as client:
        assert target(client, "web")["wanted"] == "up"
        client.call("start", names=["web:1"])
    assert states_of_the_next(serve, "web") == ["running"] * 3


def test_one_that_was_stopped_alone_keeps_nobody_waiting_and_stays_down(serve: Serve) -> None:
    def states(client: ControlClient) -> list[str]:
        client.call("wait", {"names": ["web:0", "web:2", "later"], "for": "ready", "timeout": 60})
        return [each["state"] for each in target(client, "web")["instances"]]

    with serve.start(f"{THREE}[target.later]\n{SLEEPER}depends_on = ['web']\n") as client:
        client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        client.call("stop", names=["web:1"])
    others = ["running", "stopped", "running"]
    assert states_of_the_next(serve, "web:0", "web:2", "later") == others
    with serve.connect() as client:
        client.call("restart", names=["later"])
        client.call("start", names=["later"])
        assert states(client) == others
        started = client.call("supervisor.info")["started"]
        client.call("supervisor.reexec")
    with serve.connect_to_next(started) as client:
        assert states(client) == others
    assert states_of_the_next(serve, "web:0", "web:2", "later") == others


def test_a_stop_of_one_instance_that_had_not_begun_is_carried_out_by_the_next(serve: Serve) -> None:
    # A number of instances is taken up before anything else is done.
    told = "[ $ASYNCSUP_INSTANCE = web:2 ] && until [ -e go ]; do sleep 0.05; done; exit"
    script = f"trap '{told}' TERM; echo up; while :; do sleep 0.05; done"
    command = f"command = ['sh', '-c', {json.dumps(script)}]\nready.log = '^up$'\n"
    with serve.start(f"{QUICK}[target.web]\n{command}instances = 3\nstop_timeout = '100s'\n") as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        started = client.call("supervisor.info")["started"]
        Asked(serve.endpoint, "scale", name="web", instances=2)
        wait_for(
            lambda: target(client, "web")["instances"][2]["state"] == "stopping", "the last to be stopped"
        )
        Asked(serve.endpoint, "stop", names=["web:0"])
        wait_for(
            lambda: [each["operation"] for each in target(client, "web")["waiting"]] == ["stop"], "the stop"
        )
        serve.kill_supervisor()
    (serve.folder / "go").touch()
    with serve.connect_to_next(started) as client:
        wait_for(lambda: instance(client, "web:0")["state"] == "stopped", "it to be stopped")
        assert instance(client, "web:1")["state"] == "running"


def test_what_was_said_of_a_slot_does_not_count_for_a_new_one(serve: Serve) -> None:
    with serve.start(THREE) as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        client.call("stop", names=["web:2"])
    assert serve.stop() == 0
    with serve.start(THREE.replace("instances = 3", "instances = 2")) as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        client.call("scale", name="web", instances=3)
        assert instance(client, "web:2")["ready"]
    assert states_of_the_next(serve, "web") == ["running"] * 3


def test_one_instance_that_is_started_alone_is_alone_for_the_next_too(serve: Serve) -> None:
    with serve.start(THREE) as client:
        client.call("stop", names=["web"])
        client.call("start", names=["web:2"])
    assert states_of_the_next(serve, "web:2") == ["stopped", "stopped", "running"]
    with serve.connect() as client:
        client.call("restart", names=["web"])
    assert states_of_the_next(serve, "web") == ["running"] * 3


def test_one_instance_that_is_stopped_while_the_disk_is_full_is_named(serve: Serve) -> None:
    with serve.start(THREE) as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        with no_room(serve.supervisor):
            error = fails(client, "stop", names=["web:1"])
        assert error.message.startswith("web:1 is stopped, but that cannot be written down (")
        client.call("stop", names=["web:1"])
    assert states_of_the_next(serve, "web:0", "web:2") == ["running", "stopped", "running"]


def test_a_scale_forgets_that_an_instance_was_stopped(serve: Serve) -> None:
    with serve.start(THREE) as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        client.call("stop", names=["web:0", "web:2"])
        client.call("scale", name="web", instances=2)
        client.call("scale", name="web", instances=3)
        assert instance(client, "web:2")["ready"]
    assert states_of_the_next(serve, "web:1", "web:2") == ["stopped", "running", "running"]


def test_what_is_stopped_while_the_disk_is_full_is_stopped_and_not_forgotten(serve: Serve) -> None:
    """It may be what fills it."""
    text = f'{QUICK}[target.web]\n{SLEEPER}restart = "unless-stopped"\n'
    with serve.start(text) as client:
        pid = reached(client, "web", "running")["pid"]
        with no_room(serve.supervisor):
            for _ in range(2):
                error = fails(client, "stop", names=["web"])
                assert error.error_code in {"state.full", "state.database"}
                assert error.message.startswith("web is stopped, but that cannot be written down (")
                assert (instance(client, "web")["state"], target(client, "web")["wanted"]) == (
                    "stopped",
                    "down",
                )
        assert not alive(pid)
        client.call("stop", names=["web"])
        with no_room(serve.supervisor):
            assert fails(client, "start", names=["web"]).error_code in {"state.full", "state.database"}
            assert (instance(client, "web")["state"], target(client, "web")["wanted"]) == ("stopped", "down")
    assert serve.stop() == 0
    with serve.start(text) as client:
        assert instance(client, "web")["state"] == "stopped"
        client.call("start", names=["web"])
        assert instance(client, "web")["ready"]


def test_environment_is_configured_and_files_are_read_again_at_each_start(serve: Serve) -> None:
    env_file = serve.folder / "web.env"
    env_file.write_text("# comment\nFROM_FILE=one\nBOTH=file\n")
    serve.environ = {"SECRET": "inherited", "NOTIFY_SOCKET": "/not/yours", "OTHER": "hidden"}
    client = serve.start(
        QUICK
        + '[target.web]\ncommand = "sh -c \'echo \\"$FROM_FILE $BOTH $SECRET/$OTHER/$NOTIFY_SOCKET $I\\";'
        ' exec sleep 3600\'"\nenv = { BOTH = "config", I = "i${instance}" }\n'
        'env_files = ["web.env"]\ninherit_env = ["SECRET"]\n'
    )
    wait_for(
        lambda: "one config inherited// i0\n" in client.call("logs", name="web")["chunks"][0]["text"], "it"
    )
    env_file.write_text("FROM_FILE=two\n")
    client.call("restart", names=["web"])
    wait_for(
        lambda: "two config inherited// i0\n" in client.call("logs", name="web")["chunks"][0]["text"], "it"
    )
    env_file.write_text("not an assignment\n")
    assert "web.env:1: not NAME=VALUE" in fails(client, "restart", names=["web"]).message
    client.close()


def test_logs_are_followed_across_rotation(serve: Serve) -> None:
    os.mkfifo(serve.folder / "pipe")
    client = serve.start(
        QUICK
        + "[target.talk]\ncommand = ['sh', '-c', 'while read -r line; do echo \"$line\"; done < pipe']\n"
        "[target.talk.log]\nmax_size = 40\nmax_files = 10\n"
    )
    chunk = client.call("logs", name="talk", lines=0)["chunks"][0]
    cursor, text = chunk["cursor"], ""
    with (serve.folder / "pipe").open("w", buffering=1) as pipe:
        for number in range(1, 16):
            pipe.write(f"line {number}\n")
            while f"line {number}\n" not in text:
                chunks = client.call("logs.follow", cursors=[cursor])["chunks"]
                text += "".join(c["text"] for c in chunks)
                cursor = chunks[-1]["cursor"] if chunks else cursor
        client.call("stop", names=["talk"])
    assert text == "".join(f"line {number}\n" for number in range(1, 16))
    assert (serve.folder / ".asyncsup/logs/talk.0.log.1").exists()
    client.close()


def test_stderr_goes_where_it_is_told(serve: Serve) -> None:
    client = serve.start(
        QUICK + '[defaults.log]\nstderr = "separate"\n'
        "[target.a]\ncommand = \"sh -c 'echo out; echo err >&2; exec sleep 3600'\"\n"
        "[target.b]\ncommand = \"sh -c 'echo out; echo err >&2; exec sleep 3600'\"\n"
        'log = { stderr = "stdout" }\n'
    )

    def text(name: str, stream: str) -> str:
        found: str = client.call("logs", name=name, stream=stream)["chunks"][0]["text"]
        return found

    wait_for(lambda: text("a", "stderr") == "err\n", "stderr of a")
    wait_for(lambda: text("b", "stdout") == "out\nerr\n", "both of b")
    assert text("a", "stdout") == "out\n"
    client.close()


def test_events_are_numbered_without_gaps_and_a_snapshot_says_where_it_stands(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}instances = 20\n")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    snapshot = client.call("status")
    events = client.call("events.since", seq=0)["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert snapshot["seq"] <= len(events)
    client.call("stop", names=["web:3"])
    newer = client.call("events.since", seq=snapshot["seq"])["events"]
    assert newer[0]["seq"] == snapshot["seq"] + 1
    assert {event["to"] for event in newer if event["type"] == "instance.state"} == {"stopping", "stopped"}
    client.close()


def test_wait_says_who_is_missing(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}autostart = false\n")
    error = fails(client, "wait", names=["web"], **{"for": "ready"}, timeout=0.1)
    assert (error.remote_exit_status, error.error_code) == (124, "timeout")
    assert "web:0 is stopped" in error.message
    client.close()


def test_names_globs_and_instances_are_found_and_unknown_ones_named(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.web-a]\n{SLEEPER}instances = 3\n[target.web-b]\n{SLEEPER}[target.db]\n{SLEEPER}"
    )

    def names(*patterns: str) -> list[str]:
        return [i["name"] for t in client.call("status", names=patterns)["targets"] for i in t["instances"]]

    assert names("web-*") == ["web-a:0", "web-a:1", "web-a:2", "web-b:0"]
    assert names("web-a:1", "db") == ["web-a:1", "db:0"]
    assert len(names("all")) == len(names()) == 5
    error = fails(client, "status", names=["wbe-a"])
    assert (error.error_code, error.remote_exit_status) == ("target.not_found", 4)
    assert "did you mean 'web-a'" in error.message
    assert "web-a:7" in fails(client, "status", names=["web-a:7"]).message
    client.close()


def test_a_slow_target_delays_nobody_else(serve: Serve) -> None:
    client = serve.start(f'{QUICK}[target.deaf]\n{IGNORES_TERM}stop_timeout = "1h"\n[target.web]\n{SLEEPER}')
    wait_for(lambda: "up" in client.call("logs", name="deaf")["chunks"][0]["text"], "the program")
    with ControlClient(serve.endpoint) as other:
        stuck = threading.Thread(target=lambda: other.call("stop", names=["deaf"]))
        stuck.start()
        reached(client, "deaf", "stopping")
        client.call("restart", names=["web"])
        client.call("status")
        pid = instance(client, "deaf")["pid"]
        os.kill(pid, signal.SIGKILL)
        stuck.join(60)
    client.close()
