"""What goes wrong while a target has two processes in one place; what is left has to be one that serves,
on the files in force.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Asked, Serve, wait_for
from test_overlap import Town

from asyncsup.client import ControlClient
from asyncsup.errors import TimeoutExpiredError

START = '        if MODE != "mute":\n'
LATE = """        if MODE == "late":
            while not os.path.exists("go"):
                await asyncio.sleep(0.01)
        if MODE == "uneven-late" and not os.environ["ASYNCSUP_INSTANCE"].endswith(":0"):
            if os.path.exists("uneven"):
                sys.exit("this build cannot start")
            while not os.path.exists("go"):
                await asyncio.sleep(0.01)
        if MODE == "in-turn":
            if os.environ["ASYNCSUP_INSTANCE"].endswith(":0"):
                target.ready()
                with open("first.new", "w") as file:
                    file.write(str(os.getpid()))
                os.replace("first.new", "first")
                while not os.path.exists("second"):
                    await asyncio.sleep(0.01)
                await service.drain()
                sys.exit("this build falls")
            open("second", "w").close()
            while not os.path.exists("first") or os.path.exists(f"/proc/{open('first').read()}"):
                await asyncio.sleep(0.01)
"""
"""Further modes: late (ready when there is a file ``go``), uneven-late (both), in-turn (the first instance
is ready and falls once another one is being started, then the others become ready)."""
LONG = 'restart_delay = "1h"\nrestart_max_delay = "1h"\nmin_uptime = "1h"\n'
"""Whoever is killed waits for a long time."""


@pytest.fixture
def town(serve: Serve) -> Iterator[Town]:
    made = Town(serve)
    assert START in made.source
    made.source = made.source.replace(START, LATE + START)
    (made.root / "service.py").write_text(made.source)
    yield made
    made.close()


def killed(town: Town, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "it to be gone")


def settled_on(town: Town, version: str) -> None:
    """Every slot has one process, and that is of a version."""
    town.wait_ready()
    town.wait_alone()
    said = {f"{version} serves"}
    wait_for(lambda: {i["status_text"] for i in town.target["instances"]} == said, f"all to be {version}")


def test_a_new_one_that_falls_while_another_starts_takes_nobodys_place(town: Town) -> None:
    town.start("instances = 2")
    before = town.pids
    town.use()
    error = town.refused("v2", "in-turn")
    assert error.details["cause"] == "patch.start_failed"
    assert town.pids == before
    settled_on(town, "v1")
    town.unharmed()


def test_one_of_an_earlier_batch_that_has_fallen_fails_the_patch(town: Town) -> None:
    town.start(f"instances = 2\noverlap = false\n{LONG}", patch="max_parallel = 1")
    error = town.refused("v2", "in-turn")
    assert error.details["cause"] == "patch.probation_failed"
    settled_on(town, "v1")


def test_those_that_were_stopped_first_go_back_too_whoever_takes_the_patch_back(town: Town) -> None:
    town.start("instances = 2\noverlap = false", patch='max_parallel = 1\ncommit = "manual"')
    txn = town.apply("v2")["txn"]
    town.serve.kill_supervisor()
    town.again()
    wait_for(lambda: town.target.get("uncommitted") == txn, "the patch to wait again")
    town.control.call("patch.abort", {"id": str(txn)}, timeout=100)
    wait_for(lambda: town.target.get("uncommitted") is None, "it to be taken back")
    settled_on(town, "v1")


def test_one_that_does_not_come_up_on_the_old_files_leaves_no_other_down(town: Town) -> None:
    broken = town.serve.folder / "broken"
    town.source = town.source.replace(
        "target = Target()\n",
        'if VERSION == "v1" and os.path.exists("broken") and os.environ["ASYNCSUP_INSTANCE"] == "app:0":\n'
        '    sys.exit("broken")\n'
        "target = Target()\n",
    )
    (town.root / "service.py").write_text(town.source)
    town.start(
        'instances = 2\noverlap = false\nrestart_max_delay = "1s"\nstart_limit_burst = 1000',
        patch="max_parallel = 1",
    )
    for name in ("broken", "uneven"):
        (town.serve.folder / name).touch()
    error = town.refused("v2", "uneven")
    assert error.error_code == "patch.rollback_failed"
    assert "app:0" in error.message
    broken.unlink()
    wait_for(lambda: states(town) == ["running"] * 2, "both to run")
    settled_on(town, "v1")


@pytest.mark.parametrize("meanwhile", ["nothing", "restart", "rolling", "stopped", "killed"])
def test_an_undecided_patch_is_taken_back_whatever_has_become_of_the_processes(
    town: Town, meanwhile: str
) -> None:
    town.start("instances = 2", patch='rollback = "manual"')
    before = town.pids
    error = town.refused("v2", "regret")
    assert error.error_code == "patch.undecided"
    txn = town.target["undecided"]
    assert [other["role"] for other in town.target["others"]] == ["standby"] * 2
    if meanwhile in {"restart", "rolling"}:
        town.control.call("restart", {"names": ["app"], "rolling": meanwhile == "rolling"}, timeout=100)
    elif meanwhile == "stopped":
        town.control.call("stop", {"names": ["app"]}, timeout=100)
        town.control.call("start", {"names": ["app"]}, timeout=100)
    elif meanwhile == "killed":
        town.serve.kill_supervisor()
        town.again()
        assert [other["role"] for other in town.target["others"]] == ["standby"] * 2
    town.control.call("patch.abort", {"id": str(txn)}, timeout=100)
    settled_on(town, "v1")
    if meanwhile in {"nothing", "killed"}:
        assert town.pids == before


def undecided(town: Town, mode: str, more: str) -> str:
    """The number of a patch of three instances, of which only the first has taken it up."""
    uneven = town.serve.folder / "uneven"
    uneven.touch()
    town.start(f"instances = 3\n{more}", patch='max_parallel = 1\nrollback = "manual"')
    assert town.refused("v2", mode).error_code == "patch.undecided"
    uneven.unlink()
    return str(town.target["undecided"])


def states(town: Town) -> list[str]:
    return [instance["state"] for instance in town.target["instances"]]


def test_a_client_that_gives_up_what_follows_its_commit_leaves_nobody_down(town: Town) -> None:
    go = town.serve.folder / "go"
    go.touch()
    txn = undecided(
        town,
        "uneven",
        'overlap = false\nstop_timeout = "1h"\nhooks.timeout = "1h"\n'
        "hooks.pre_stop = ['sh', '-c', 'until test -e go; do sleep 0.05; done']",
    )
    town.wait_ready()
    go.unlink()
    command = [sys.executable, "-m", "asyncsup", "-c", str(town.serve.config), "patch", "commit", txn]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as committing:
        wait_for(lambda: states(town) == ["running", "running", "stopping"], "the last one to be stopped")
        committing.send_signal(signal.SIGINT)
    town.control.call("supervisor.info")  # it has heard what came before
    go.touch()
    wait_for(lambda: town.target["busy"] is None, "the commit to end")
    shown = town.control.call("patch.show", {"id": txn})
    assert shown["verdict"] == "committed"
    assert "given up: its client gave up" in [step["detail"] for step in shown["steps"]]
    settled_on(town, "v2")


def test_a_stop_that_comes_after_a_commit_gives_up_what_is_left_and_not_the_commit(town: Town) -> None:
    txn = undecided(town, "uneven-late", "")
    before = town.pids
    committing = Asked(town.serve.endpoint, "patch.commit", id=txn)
    wait_for(lambda: "starting" in [o["state"] for o in town.target["others"]], "another one to be replaced")
    stopping = Asked(town.serve.endpoint, "stop", names=["app:2"])
    assert committing.result()["verdict"] == "committed"
    stopping.result()
    (town.serve.folder / "go").touch()
    town.wait_alone()
    assert town.pids == [*before[:2], None]
    assert town.target["undecided"] is None


def test_an_old_one_that_has_crashed_is_not_started_beside_the_new_one(town: Town) -> None:
    town.start(LONG, patch='commit = "manual"')
    (before,) = town.pids
    with ControlClient(town.serve.endpoint) as other:
        path = town.patch("v2", "late")
        asked = Asked(town.serve.endpoint, "patch.apply", path=path)
        wait_for(lambda: [o["state"] for o in town.target["others"]] == ["starting"], "the new one")
        killed(town, before)
        wait_for(lambda: town.target["state"] == "backoff", "the end to be seen")
        (town.serve.folder / "go").touch()
        txn = asked.result()["txn"]
        assert [o["state"] for o in town.target["others"]] == ["stopped"]
        other.call("patch.abort", {"id": str(txn)}, timeout=100)
    settled_on(town, "v1")


def test_settings_that_cannot_be_taken_up_leave_nobody_down(town: Town) -> None:
    town.start(f"instances = 2\n{LONG}")
    stays, falls = town.pids
    killed(town, falls)
    wait_for(lambda: town.target["state"] == "backoff", "the end to be seen")
    town.serve.write(
        town.settings(
            f"instances = 2\n{LONG}env = {{ COLOUR = 'red' }}\n"
            "start_timeout = '1s'\nready.http = 'http://127.0.0.1:1/'"
        )
    )
    assert "app" in town.control.call("config.apply", {"wait": True}, timeout=100)["failed"]
    settled_on(town, "v1")
    assert town.pids[0] == stays


def test_a_supervisor_killed_right_after_the_commit_lets_the_old_one_go(town: Town) -> None:
    wish = town.folder / "wish"
    wish.write_text("store.commit.tidied:kill")
    town.serve.environ["ASYNCSUP_FAILPOINT"] = f"@{wish}"
    town.start()
    before = town.pids
    first = town.serve.supervisor
    Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2"))
    wait_for(lambda: town.serve.supervisor not in {0, first}, "another supervisor")
    wish.write_text("")
    town.again()
    settled_on(town, "v2")
    assert town.pids != before


def test_who_is_on_the_way_out_is_asked_no_more_whether_it_lives(town: Town) -> None:
    sick = town.folder / "sick"
    town.start(
        f"liveness.exec = ['test', '!', '-e', '{sick}']\n"
        "liveness.interval = '50ms'\nliveness.timeout = '1m'\nliveness.failure_threshold = 1"
    )
    with socket.create_connection(town.address, 60) as connection:
        connection.sendall(b"?\n")
        connection.recv(1024)
        (old,) = town.pids
        town.apply("v2")
        (new,) = town.pids
        sick.touch()
        wait_for(lambda: town.pids != [new], "the new one to be restarted")
        sick.unlink()
        connection.sendall(b"?\n")
        assert connection.recv(1024).decode().split()[:2] == ["v1", str(old)]
    settled_on(town, "v2")


def test_a_client_that_gives_up_a_rolling_restart_leaves_nobody_down(town: Town) -> None:
    town.start(
        'overlap = false\nstop_timeout = "1h"\nhooks.timeout = "1h"\n'
        "hooks.pre_stop = ['sh', '-c', 'until test -e go; do sleep 0.05; done']"
    )
    (before,) = town.pids

    def is_given_up_in_the_middle() -> bool:
        with pytest.raises(TimeoutExpiredError):
            town.control.call("restart", {"names": ["app"], "rolling": True}, timeout=2)
        return bool(town.target["state"] == "stopping")

    wait_for(is_given_up_in_the_middle, "it to be given up while the old one is being stopped")
    (town.serve.folder / "go").touch()
    wait_for(lambda: town.pids not in ([before], [None]), "another process")
    settled_on(town, "v1")


def test_nothing_is_left_of_those_that_were_replaced(town: Town) -> None:
    town.start("instances = 2")

    journal = next(town.folder.glob(".asyncsup/**/journal"))

    def facts() -> set[str]:
        known = dict(map(json.loads, journal.read_text().splitlines()[1:]))
        return {key for key, value in known.items() if value is not None and key.startswith("instance ")}

    town.apply("v2")
    settled_on(town, "v2")
    folder = Path(f"/proc/{town.serve.supervisor}/fd")
    before = len(list(folder.iterdir()))
    for number in range(3, 6):
        town.apply(f"v{number}")
        settled_on(town, f"v{number}")
    assert len(facts()) == 2
    # Some are open for a moment only, those of a request for one.
    wait_for(lambda: len(list(folder.iterdir())) <= before, "as few descriptors as before")
