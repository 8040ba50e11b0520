"""What becomes of a start when what it depends on fails, is tried again, or comes up only after that."""

from __future__ import annotations

import pytest
from conftest import Serve, wait_for
from test_supervisor import QUICK, SLEEPER, fails, instance, reached, target

DB = (
    "[target.db]\nready.exec = ['test', '-e', 'up']\nready.interval = '20ms'\nrestart = 'never'\n"
    "command = ['sh', '-c', 'echo >> runs; [ -e up ] && exec sleep 3600; exit 3']\n"
)
"""It fails, and is ready once there is a file `up`."""
MIGRATE = (
    "[target.db]\noneshot = true\nrestart = 'never'\n"
    "command = ['sh', '-c', 'echo >> runs; [ -e up ] || exit 3']\n"
)
APP = f"[target.app]\n{SLEEPER}depends_on = ['db']\n"
AFTER_MIGRATE = f"[target.app]\n{SLEEPER}depends_on = {{ db = 'exited-ok' }}\n"


def runs(serve: Serve) -> int:
    """How often db has been started."""
    return (serve.folder / "runs").read_text().count("\n")


@pytest.mark.parametrize("text", [DB + APP, MIGRATE + AFTER_MIGRATE], ids=["ready", "exited-ok"])
def test_a_start_tries_a_failed_dependency_again_and_says_when_it_fails_again(
    serve: Serve, text: str
) -> None:
    with serve.start(QUICK + text) as client:
        reached(client, "db", "failed")
        why = wait_for(lambda: instance(client, "app")["detail"].partition("; ")[2], "the reason of app")
        assert why.startswith("db has failed (")
        assert "exit status 3" in why
        assert runs(serve) == 1
        error = fails(client, "start", names=["app"])
        assert error.error_code == "target.start_failed"
        assert error.message.startswith("app:0 waits for db, which has failed: ")
        assert "exit status 3" in error.message
        assert (error.details["instance"], error.details["dependency"]) == ("app:0", "db:0")
        assert runs(serve) == 2
        # It goes on waiting, for whoever mends what is wrong.
        assert instance(client, "app")["state"] == "waiting"
        (serve.folder / "up").touch()
        client.call("start", names=["db"])
        client.call("wait", {"names": ["app"], "for": "ready", "timeout": 60})


def test_a_start_that_works_the_second_time_is_one(serve: Serve) -> None:
    with serve.start(QUICK + DB + APP) as client:
        reached(client, "db", "failed")
        (serve.folder / "up").touch()
        client.call("start", names=["app"])
        assert instance(client, "app")["ready"]
        assert instance(client, "db")["ready"]


def test_who_does_not_wait_for_it_finds_the_reason_at_the_instance(serve: Serve) -> None:
    with serve.start(QUICK + DB + APP) as client:
        reached(client, "db", "failed")
        client.call("start", names=["app"], wait=False)
        wait_for(lambda: runs(serve) == 2, "another try of db")
        reached(client, "db", "failed")
        wait_for(lambda: "; db has failed (" in instance(client, "app")["detail"], "the reason")
        assert instance(client, "app")["state"] == "waiting"


def test_the_reason_is_handed_on_to_whoever_depends_on_a_dependent(serve: Serve) -> None:
    web = f"[target.web]\n{SLEEPER}depends_on = ['app']\n"
    with serve.start(QUICK + web + APP + DB) as client:
        reached(client, "db", "failed")
        wait_for(
            lambda: "waiting for app; db has failed (" in instance(client, "web")["detail"], "the reason"
        )
        error = fails(client, "start", names=["web"])
        assert error.message.startswith("web:0 waits for db, which has failed: ")
        assert runs(serve) == 2
        results = client.call("start", names=["web", "app"])["results"]
        assert {r["code"] for r in results} == {"target.start_failed"}
        (serve.folder / "up").touch()
        client.call("start", names=["web"])
        assert all(target(client, name)["ready"] for name in ("web", "app", "db"))


def test_a_restart_whose_dependency_has_failed_ends(serve: Serve) -> None:
    with serve.start(QUICK + DB + APP) as client:
        reached(client, "db", "failed")
        assert fails(client, "restart", names=["app"]).details["dependency"] == "db:0"
        assert runs(serve) == 1
        (serve.folder / "up").touch()
        assert all(result["ok"] for result in client.call("restart", names=["all"])["results"])


def test_a_dependency_that_is_ready_after_some_restarts_is_ready(serve: Serve) -> None:
    db = (
        "[target.db]\nready.exec = ['test', '-e', 'up']\nready.interval = '20ms'\nautostart = false\n"
        "command = ['sh', '-c', 'echo >> runs; [ $(wc -l < runs) -lt 3 ] && exit 3; touch up; "
        "exec sleep 3600']\n"
    )
    with serve.start(f"{QUICK}{db}{APP}autostart = false\n") as client:
        client.call("start", names=["app"])
        assert instance(client, "app")["ready"]
        assert (runs(serve), instance(client, "db")["restarts"]) == (3, 2)


def test_who_waits_for_instances_goes_on_when_the_last_of_them_is_stopped_alone(serve: Serve) -> None:
    db = f"[target.db]\n{SLEEPER}instances = 2\nautostart = false\n"
    with serve.start(f"{QUICK}{db}{APP}") as client:
        reached(client, "app", "waiting")
        client.call("start", names=["db:0"])
        assert instance(client, "app")["state"] == "waiting"
        client.call("stop", names=["db:1"])
        reached(client, "app", "running")
        # Where each was stopped by itself, none is left to depend on: then all of them are meant.
        client.call("stop", names=["db:0"])
        client.call("stop", names=["app"])
        client.call("start", names=["app"])
        assert instance(client, "app")["ready"]
        assert [i["ready"] for i in target(client, "db")["instances"]] == [True, True]


def test_one_instance_that_was_stopped_alone_is_neither_waited_for_nor_started(serve: Serve) -> None:
    db = f"[target.db]\n{SLEEPER}instances = 2\n"
    with serve.start(f"{QUICK}{db}{APP}autostart = false\n") as client:
        client.call("wait", {"names": ["db"], "for": "ready", "timeout": 60})
        client.call("stop", names=["db:1"])
        client.call("start", names=["app"])
        assert instance(client, "app")["ready"]
        assert [i["state"] for i in target(client, "db")["instances"]] == ["running", "stopped"]
