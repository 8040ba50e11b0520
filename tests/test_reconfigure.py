"""`config plan` and `config apply` on what runs: what changed is touched, once all was checked, no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Asked, Serve, free_port, wait_for
from test_supervisor import QUICK, SLEEPER, fails, instance, reached, target

from asyncsup.client import ControlClient, Event
from asyncsup.config import load_config
from asyncsup.errors import TimeoutExpiredError
from asyncsup.keeper_link import KeeperLink
from asyncsup.reconfigure import Reconfigurer
from asyncsup.supervisor import Supervisor

TWO = f"{QUICK}[target.web]\n{SLEEPER}[target.db]\n{SLEEPER}"


class Scene:
    def __init__(self, serve: Serve, client: ControlClient) -> None:
        self.serve = serve
        self.client = client

    def pids(self) -> dict[str, Any]:
        found = self.client.call("status")["targets"]
        return {i["name"]: i["pid"] for t in found for i in t["instances"]}

    def apply(self, text: str) -> Any:
        self.serve.write(text)
        planned = self.client.call("config.plan")
        result = self.client.call("config.apply")
        assert {key: result[key] for key in planned} == planned, "it did something else than it had said"
        return result


@pytest.fixture
def scene(serve: Serve) -> Iterator[Scene]:
    client = serve.start(TWO)
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    scene = Scene(serve, client)
    yield scene
    scene.client.close()


def test_a_target_that_did_not_change_keeps_its_pid(scene: Scene) -> None:
    before = scene.pids()
    result = scene.apply(TWO.replace("[target.db]", "[target.db]\nenv.A = 'b'"))
    assert result["restarted"] == {"db": ["env"]}
    after = scene.pids()
    assert after["web:0"] == before["web:0"]
    assert after["db:0"] not in {before["db:0"], None}
    assert b"A=b" in Path(f"/proc/{after['db:0']}/environ").read_bytes().split(b"\0")


def test_what_a_process_never_sees_is_taken_up_without_a_restart(scene: Scene) -> None:
    before = scene.pids()
    result = scene.apply(
        TWO.replace(
            "[target.web]", "[target.web]\nlog.max_size = '100B'\nlog.max_files = 2\nrestart = 'never'"
        )
    )
    assert set(result["in_place"]["web"]) == {"log.max_size", "log.max_files", "restart"}
    assert scene.pids() == before
    os.kill(before["web:0"], signal.SIGKILL)
    assert reached(scene.client, "web", "failed")["exit"]["signal"] == 9, "its new policy is: never again"


def test_targets_come_and_go(scene: Scene) -> None:
    before = scene.pids()
    new = f"[target.cache]\n{SLEEPER}depends_on = ['web']\n"
    result = scene.apply(f"{QUICK}[target.web]\n{SLEEPER}{new}")
    assert (result["added"], result["removed"]) == (["cache"], ["db"])
    after = scene.pids()
    assert after["web:0"] == before["web:0"]
    assert set(after) == {"web:0", "cache:0"}
    assert instance(scene.client, "cache")["ready"]
    wait_for(lambda: not Path(f"/proc/{before['db:0']}").exists(), "the end of db")
    assert scene.client.call("config.apply")["added"] == []
    assert fails(scene.client, "stop", names=["db"]).error_code == "target.not_found"


def test_another_number_of_instances_leaves_the_others_alone(scene: Scene) -> None:
    before = scene.pids()
    scene.apply(TWO.replace("[target.web]", "[target.web]\ninstances = 3"))
    grown = scene.pids()
    assert grown["web:0"] == before["web:0"]
    assert None not in grown.values()
    scene.apply(TWO)
    assert scene.pids() == before


def test_the_supervisor_its_keeper_and_its_sockets_stay(scene: Scene) -> None:
    def internal() -> object:
        info = scene.client.call("supervisor.info")
        sockets = {
            path.name: path.stat().st_ino for path in (scene.serve.folder / ".asyncsup/run").glob("*.sock")
        }
        return info["pid"], info["started"], scene.serve.supervisor, sockets

    before = internal()
    result = scene.apply(f"{QUICK}[target.new]\n{SLEEPER}")
    assert (result["added"], set(result["removed"])) == (["new"], {"db", "web"})
    assert internal() == before
    assert scene.serve.process is not None
    assert scene.serve.process.poll() is None


def test_a_mistake_changes_nothing_at_all(scene: Scene) -> None:
    before = scene.pids()
    scene.serve.write(TWO.replace("[target.web]", "[target.web]\ninstances = 3\nrestart = 'allways'"))
    error = fails(scene.client, "config.apply")
    assert (error.error_code, error.remote_exit_status) == ("config.invalid", 5)
    assert "allways" in error.message
    assert scene.pids() == before
    assert fails(scene.client, "config.plan").error_code == "config.invalid"


def test_a_target_that_was_stopped_by_hand_is_changed_and_stays_stopped(scene: Scene) -> None:
    scene.client.call("stop", names=["db"])
    scene.apply(TWO.replace("[target.db]", "[target.db]\nenv.A = 'b'\ninstances = 2"))
    assert [i["state"] for i in target(scene.client, "db")["instances"]] == ["stopped", "stopped"]


def test_a_failed_target_is_tried_again_with_what_was_mended(scene: Scene) -> None:
    scene.apply(f"{TWO}[target.bad]\ncommand = 'no-such-program'\nstart_limit_burst = 1\n")
    reached(scene.client, "bad", "failed")
    result = scene.apply(f"{TWO}[target.bad]\n{SLEEPER}start_limit_burst = 1\n")
    assert result["failed"] == {}
    assert instance(scene.client, "bad")["ready"]


def test_what_one_target_refuses_is_told_and_the_others_are_changed(scene: Scene) -> None:
    scene.serve.write(
        TWO.replace("[target.db]", "[target.db]\numask = '077'").replace(
            f"[target.web]\n{SLEEPER}",
            "[target.web]\ncommand = 'false'\nrestart = 'never'\nmin_uptime = '1h'\n",
        )
    )
    result = scene.client.call("config.apply")
    assert list(result["failed"]) == ["web"]
    assert result["failed"]["web"]["code"] == "target.start_failed"
    assert instance(scene.client, "db")["ready"]


def test_a_client_that_gives_up_leaves_nobody_down(scene: Scene) -> None:
    deaf = scene.serve.folder / "deaf.sh"
    deaf.write_text("trap '' TERM\ntouch deaf\nuntil [ -e go ]; do sleep 0.02; done\n")
    scene.apply(f"{QUICK}[target.web]\ncommand = 'sh deaf.sh'\nstop_timeout = '5m'\n")
    wait_for((scene.serve.folder / "deaf").exists, "the program not to listen")
    before = scene.pids()
    scene.serve.write(f"{QUICK}[target.web]\n{SLEEPER}[target.new]\n{SLEEPER}")
    with ControlClient(scene.serve.endpoint) as other, other.subscribe() as events:

        def look(event: Event) -> None:
            if event.data.get("to") == "stopping":
                raise InterruptedError

        with pytest.raises(InterruptedError):
            other.call("config.apply", events=events, on_event=look)
        # While it goes on nobody else may.
        assert fails(scene.client, "config.apply").error_code == "target.busy"
    (scene.serve.folder / "go").touch()
    for name in ("web", "new"):
        reached(scene.client, name, "running")
    assert scene.pids()["web:0"] != before["web:0"]

    def applied() -> int:
        events = scene.client.call("events.since", seq=0)["events"]
        return [event["type"] for event in events].count("config.applied")

    wait_for(lambda: applied() == 2, "the end of it")
    assert not scene.client.call("config.plan")["restarted"]


def test_one_that_falls_before_its_turn_has_the_new_settings_as_well(serve: Serve) -> None:
    wait = "if [ $NEW ]; then touch began; while [ ! -e go ]; do sleep 0.05; done; fi"
    script = f"{wait}; echo up; exec sleep 3600"
    text = (
        f'[socket.web]\nlisten = "tcp://127.0.0.1:{free_port()}"\n[target.web]\nsockets = ["web"]\n'
        f'command = ["sh", "-c", "{script}"]\ninstances = 2\nready.log = "^up"\npatch.max_parallel = 1\n'
        'min_uptime = "1h"\nrestart_delay = "1h"\nrestart_max_delay = "1h"\n'
    )
    with serve.start(text) as client:
        client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
        serve.write(f'{text}env.NEW = "new"\n')
        applying = Asked(serve.endpoint, "config.apply")
        wait_for((serve.folder / "began").exists, "the first one's turn")
        os.kill(target(client, "web")["instances"][1]["pid"], signal.SIGKILL)
        wait_for(
            lambda: target(client, "web")["instances"][1]["state"] == "backoff", "the other one to be down"
        )
        (serve.folder / "go").touch()
        assert applying.result()["failed"] == {}
        for each in target(client, "web")["instances"]:
            assert each["ready"]
            assert b"NEW=new" in Path(f"/proc/{each['pid']}/environ").read_bytes().split(b"\0")


WAITS = f"[target.b]\n{SLEEPER}depends_on = ['a']\n"


def waiting_for_what_never_comes(scene: Scene) -> None:
    """A change is taken up whose new target waits for one that nobody starts, and its client has given up."""
    scene.apply(f"{QUICK}[target.a]\n{SLEEPER}autostart = false\n")
    scene.serve.write(f"{QUICK}[target.a]\n{SLEEPER}autostart = false\n{WAITS}")
    with pytest.raises(TimeoutExpiredError):
        scene.client.call("config.apply", timeout=1)
    reached(scene.client, "b", "waiting")


def test_a_change_that_waits_for_what_never_comes_keeps_nobody_from_the_next(scene: Scene) -> None:
    waiting_for_what_never_comes(scene)
    result = scene.apply(f"{QUICK}[target.a]\n{SLEEPER}autostart = false\n[target.b]\n{SLEEPER}")
    assert result["failed"] == {}
    reached(scene.client, "b", "running")


@pytest.mark.parametrize("under_way", ["waiting", "stopping"])
def test_another_program_takes_over_in_the_middle_of_a_change(scene: Scene, under_way: str) -> None:
    if under_way == "waiting":
        waiting_for_what_never_comes(scene)
    else:
        deaf = scene.serve.folder / "deaf.sh"
        deaf.write_text("trap '' TERM\ntouch deaf\nuntil [ -e go ]; do sleep 0.02; done\n")
        scene.apply(f"{QUICK}[target.a]\ncommand = 'sh deaf.sh'\nstop_timeout = '5m'\n")
        wait_for((scene.serve.folder / "deaf").exists, "the program not to listen")
        scene.serve.write(f"{QUICK}[target.a]\n{SLEEPER}")
        assert scene.serve.process is not None
        scene.serve.process.send_signal(signal.SIGHUP)
        wait_for(lambda: instance(scene.client, "a")["state"] == "stopping", "the change")
    started = scene.client.call("supervisor.info")["started"]
    scene.client.call("supervisor.reexec", timeout=60)
    scene.client.close()
    scene.client = scene.serve.connect_to_next(started)
    (scene.serve.folder / "go").touch()
    if under_way == "stopping":
        reached(scene.client, "a", "running")


def test_output_goes_to_its_new_place(scene: Scene) -> None:
    ticking = "command = ['sh', '-c', 'while true; do echo tick; sleep 0.05; done']\n"
    scene.apply(TWO.replace(f"[target.db]\n{SLEEPER}", f"[target.db]\n{ticking}"))
    scene.apply(TWO.replace(f"[target.db]\n{SLEEPER}", f"[target.db]\n{ticking}log.stdout = 'db.txt'\n"))
    place = scene.serve.folder / "db.txt"
    wait_for(lambda: place.exists() and "tick" in place.read_text(), "output in the new place")


JOB = """[target.job]
command = ["sh", "-c", "echo ran >> runs"]
oneshot = true
autostart = false
schedule = "* * * * * *"
"""


def test_a_schedule_goes_on_when_its_target_has_been_away(scene: Scene) -> None:
    runs = scene.serve.folder / "runs"
    scene.apply(TWO + JOB)
    wait_for(runs.exists, "a run")
    scene.apply(TWO)
    before = runs.read_text()
    scene.apply(TWO + JOB)
    wait_for(lambda: runs.read_text() != before, "another run")


def test_a_target_that_was_away_starts_with_the_next_supervisor(scene: Scene) -> None:
    there = f"{TWO}[target.kept]\n{SLEEPER}restart = 'unless-stopped'\n"
    scene.apply(there)
    scene.apply(TWO)
    assert scene.serve.stop() == 0
    with scene.serve.start(there) as client:
        client.call("wait", {"names": ["kept"], "for": "ready", "timeout": 60})


@pytest.mark.parametrize("remembers", ["restart = 'unless-stopped'", "schedule = '0 0 1 1 *'"])
def test_what_an_operator_has_stopped_stays_stopped_when_it_has_been_away(
    scene: Scene, remembers: str
) -> None:
    there = f"{TWO}[target.kept]\n{SLEEPER}{remembers}\n"
    scene.apply(there)
    assert instance(scene.client, "kept")["ready"]
    scene.client.call("stop", names=["kept"])
    scene.apply(TWO)
    scene.apply(there)
    assert instance(scene.client, "kept")["state"] == "stopped"
    scene.client.call("start", names=["kept"])
    assert instance(scene.client, "kept")["ready"]


def test_groups_and_dependencies_follow(scene: Scene) -> None:
    scene.apply(f"{TWO}depends_on = ['web']\n[group.both]\ntargets = ['*']\n")
    scene.client.call("stop", names=["both"])
    assert [t["state"] for t in scene.client.call("status")["targets"]] == ["stopped", "stopped"]
    scene.client.call("start", names=["db"])
    assert instance(scene.client, "web")["ready"], "it is started because db needs it now"


def test_liveness_is_taken_up_by_what_runs_already(scene: Scene) -> None:
    before = scene.pids()["web:0"]
    scene.apply(TWO.replace("[target.db]", "liveness = { exec = 'false', interval = '50ms' }\n[target.db]"))
    wait_for(lambda: scene.pids()["web:0"] not in {before, None}, "another process")
    assert "liveness failed" in instance(scene.client, "web")["exit"]["reason"]


def test_liveness_is_taken_up_by_what_is_still_starting(serve: Serve) -> None:
    script = "while [ ! -e go ]; do sleep 0.05; done; echo up; exec sleep 3600"
    text = f"{QUICK}[target.web]\ncommand = ['sh', '-c', '{script}']\nready.log = '^up$'\n"
    client = serve.start(text)
    scene = Scene(serve, client)
    before = reached(client, "web", "starting")["pid"]
    result = scene.apply(f"{text}liveness = {{ exec = 'touch asked', interval = '50ms' }}\n")
    assert "liveness.exec" in result["in_place"]["web"]
    assert instance(client, "web")["state"] == "starting"
    (serve.folder / "go").touch()
    wait_for((serve.folder / "asked").exists, "the question whether it is alive")
    assert (instance(client, "web")["pid"], instance(client, "web")["state"]) == (before, "running")
    client.close()


def test_sighup_is_an_apply(scene: Scene) -> None:
    before = scene.pids()
    scene.serve.write(TWO.replace("[target.web]", "[target.web]\numask = '077'"))
    assert scene.serve.process is not None
    scene.serve.process.send_signal(signal.SIGHUP)
    wait_for(lambda: scene.pids()["web:0"] not in {before["web:0"], None}, "another process")
    assert scene.pids()["db:0"] == before["db:0"]


def does_not_want_to_end(serve: Serve) -> tuple[Path, Path, str]:
    """A target `slow`: the file that says that it was told to end, the file that lets it, and its table."""
    told, may_end = serve.folder / "told", serve.folder / "may-end"
    waits = f": > {told}; while [ ! -e {may_end} ]; do sleep 0.05; done; exit"
    script = f"trap '{waits}' TERM; echo up; while :; do sleep 0.05; done"
    command = f"command = ['sh', '-c', {json.dumps(script)}]\nready.log = '^up$'\n"
    return told, may_end, f"[target.slow]\n{command}stop_timeout = '30s'\n"


def test_a_target_that_is_due_while_it_is_being_removed_is_not_missed(serve: Serve) -> None:
    """What takes the time is another target, which does not want to end."""
    began, may_end, slow = does_not_want_to_end(serve)
    job = "[target.job]\ncommand = 'true'\noneshot = true\nautostart = false\nschedule = '* * * * * *'\n"
    with serve.start(f"{slow}{job}") as client:
        client.call("wait", {"names": ["slow"], "for": "ready", "timeout": 60})
        client.call("start", names=["job"])
        wait_for(lambda: instance(client, "job")["state"] == "exited", "its first run")
        before = serve.supervisor
        serve.write(f"{slow}env.A = 'b'\n")
        applying = Asked(serve.endpoint, "config.apply")
        wait_for(began.exists, "slow to be asked to end: job is removed by then")
        assert fails(client, "status", names=["job"]).error_code == "target.not_found"
        # Due once a second: the time is its, and not something that is waited for.
        time.sleep(2.5)
        may_end.touch()
        assert applying.result()["removed"] == ["job"]
        assert serve.supervisor == before
        assert client.call("supervisor.info")["pid"] == before


def test_a_sighup_while_the_one_before_is_taken_up_counts(serve: Serve) -> None:
    told, may_end, slow = does_not_want_to_end(serve)
    web = f"[target.web]\n{SLEEPER}"
    with serve.start(slow + web) as client:
        client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        before = instance(client, "web")["pid"]
        assert serve.process is not None
        serve.write(f"{slow}env.A = 'b'\n{web}")
        serve.process.send_signal(signal.SIGHUP)
        wait_for(told.exists, "the first one to be taken up")
        serve.write(f"{slow}env.A = 'b'\n{web}umask = '077'\n")
        for _ in range(3):
            serve.process.send_signal(signal.SIGHUP)
            client.call("status")
        may_end.touch()
        wait_for(lambda: instance(client, "web")["pid"] not in {before, None}, "the second one")
        assert client.call("config.plan")["restarted"] == {}


def test_a_sighup_with_a_number_that_is_too_large_for_the_system_harms_nobody(scene: Scene) -> None:
    before, supervisor = scene.pids(), scene.serve.supervisor
    scene.serve.write(f"{TWO}group = '9999999999'\nready.log = 'a{{99999999999}}'\n")
    assert scene.serve.process is not None
    scene.serve.process.send_signal(signal.SIGHUP)
    wait_for(lambda: "SIGHUP: nothing was changed: " in scene.serve.errors(), "the refusal")
    assert 'target.db.group = "9999999999": there is no such group' in scene.serve.errors()
    assert 'target.db.ready.log = "a{99999999999}": not a regular expression' in scene.serve.errors()
    assert (scene.pids(), scene.serve.supervisor) == (before, supervisor)


@pytest.mark.anyio
async def test_a_sighup_that_fails_unexpectedly_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "asyncsup.toml"
    config.write_text(TWO)
    supervisor = Supervisor(load_config(config), KeeperLink(None))
    supervisor.reconfigurer = Reconfigurer(supervisor)

    async def fails_unexpectedly(**_: Any) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(supervisor.reconfigurer, "apply", fails_unexpectedly)
    await supervisor._reconfigure_on_signal()
    assert "a mistake of ours" in caplog.text


def test_the_command_says_what_it_would_do_and_then_does(scene: Scene) -> None:
    def run(verb: str) -> str:
        command = [sys.executable, "-m", "asyncsup", "-c", str(scene.serve.config), "config", verb]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run("plan") == "nothing has changed\n"
    scene.serve.write(
        f"{QUICK}[target.web]\n{SLEEPER}umask = '077'\n[target.cache]\n{SLEEPER}"
        "[supervisor]\nstate_dir = 'x'\nruntime_dir = '.asyncsup/run'\n"
    )
    said = [
        "+ cache  new",
        "- db     stopped, configured no more",
        "~ web    restarted: umask",
        "! only a new `asyncsup serve` takes up supervisor.state_dir",
    ]
    assert run("plan").splitlines() == said
    assert run("apply").splitlines() == said
