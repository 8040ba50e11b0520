"""Several targets are stopped dependents first; a restart brings them up again in the other order."""

from __future__ import annotations

import pytest
from conftest import Asked, Serve, wait_for
from test_shutdown import Scene
from test_supervisor import QUICK, SLEEPER, instance, no_room, reached, target

from asyncsup.client import ControlClient

CHAIN = (
    f"{QUICK}[target.db]\n{SLEEPER}[target.cache]\n{SLEEPER}depends_on = ['db']\n"
    f"[target.web]\n{SLEEPER}instances = 2\ndepends_on = ['cache']\n"
    "[group.ends]\ntargets = ['db', 'web']\n"
)


def steps_after(client: ControlClient, seq: int) -> list[str]:
    events = client.call("events.since", seq=seq)["events"]
    return [f"{e['instance']} {e['to']}" for e in events if e["type"] == "instance.state"]


def ready(client: ControlClient) -> int:
    """Wait for everybody; returns the number of the latest event."""
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    seq: int = client.call("status")["seq"]
    return seq


@pytest.mark.parametrize("names", [["all"], ["db", "cache", "web"], ["db:0", "web:*", "cache"]])
def test_dependents_are_stopped_first_whatever_the_order_they_are_named_in(
    serve: Serve, names: list[str]
) -> None:
    with serve.start(CHAIN) as client:
        seq = ready(client)
        answer = client.call("stop", names=names)
        assert [(r["target"], r["ok"], r["state"]) for r in answer["results"]] == [
            (name, True, "stopped") for name in ("db", "cache", "web")
        ]
        steps = steps_after(client, seq)
        assert steps[-4:] == ["cache:0 stopping", "cache:0 stopped", "db:0 stopping", "db:0 stopped"]


def test_what_lies_between_two_of_them_hands_the_order_on(serve: Serve) -> None:
    with serve.start(CHAIN) as client:
        seq = ready(client)
        client.call("stop", names=["ends"])
        steps = steps_after(client, seq)
        assert len(steps) == 6
        assert steps[-2:] == ["db:0 stopping", "db:0 stopped"]
        assert instance(client, "cache")["state"] == "running"


def test_one_alone_is_stopped_although_others_depend_on_it(serve: Serve) -> None:
    with serve.start(CHAIN) as client:
        ready(client)
        client.call("stop", names=["db"])
        assert [t["state"] for t in client.call("status")["targets"]] == ["stopped", "running", "running"]


def test_the_order_is_kept_when_nobody_waits(serve: Serve) -> None:
    with serve.start(CHAIN) as client:
        seq = ready(client)
        answer = client.call("stop", names=["all"], wait=False)
        assert {result["detail"] for result in answer["results"]} == {"begun"}
        reached(client, "db", "stopped")
        assert steps_after(client, seq)[-2:] == ["db:0 stopping", "db:0 stopped"]


def test_what_has_nothing_to_do_with_each_other_is_stopped_side_by_side(scene: Scene) -> None:
    scene.serve.begin(scene.program("one") + scene.program("two"))
    scene.ready()
    stopping = Asked(scene.serve.endpoint, "stop", names=["all"])
    wait_for(lambda: scene.told("one") and scene.told("two"), "both to be told before either has ended")
    scene.let_go("one", "two")
    assert all(result["ok"] for result in stopping.result()["results"])


def test_what_one_of_them_refuses_keeps_none_of_the_others_up(serve: Serve) -> None:
    web = f"[target.web]\n{SLEEPER}depends_on = ['db']\nrestart = 'unless-stopped'\n"
    with serve.start(f"{QUICK}[target.db]\n{SLEEPER}{web}") as client:
        ready(client)
        with no_room(serve.supervisor):
            answer = client.call("stop", names=["all"])
        assert [(r["target"], r["ok"]) for r in answer["results"]] == [("db", True), ("web", False)]
        assert [t["state"] for t in client.call("status")["targets"]] == ["stopped", "stopped"]


class GivenUpError(Exception):
    pass


def give_up_once_told(client: ControlClient, scene: Scene, method: str, name: str) -> None:
    """Ask it of all, and give up as soon as this one was told to end."""

    def look() -> bool:
        if scene.told(name):
            raise GivenUpError
        return False

    with pytest.raises(GivenUpError):
        client.call(method, {"names": ["all"]}, timeout=100, slow_after=0.02, on_slow=look)
    client.call("status")  # then it has heard of that, too


def test_a_stop_that_was_given_up_has_not_stopped_those_whose_turn_had_not_come(scene: Scene) -> None:
    scene.serve.begin(scene.program("db") + scene.program("web", "depends_on = ['db']"))
    scene.ready()
    with scene.serve.connect() as client:
        give_up_once_told(client, scene, "stop", "web")
        scene.let_go("web")
        reached(client, "web", "stopped")
        assert target(client, "db")["wanted"] == "up"
        assert scene.told("db") == 0


def test_a_restart_of_several_goes_down_and_up_in_order(serve: Serve) -> None:
    with serve.start(CHAIN) as client:
        seq = ready(client)
        answer = client.call("restart", names=["all"])
        assert all(result["ok"] and result["state"] == "running" for result in answer["results"])
        steps = steps_after(client, seq)
    down = [step for step in steps if step.endswith((" stopping", " stopped"))]
    assert down[-4:] == ["cache:0 stopping", "cache:0 stopped", "db:0 stopping", "db:0 stopped"]
    up = [step for step in steps if step.endswith((" starting", " running"))]
    assert up[:4] == ["db:0 starting", "db:0 running", "cache:0 starting", "cache:0 running"]
    assert steps.index("db:0 stopped") < steps.index("db:0 starting")
    assert sorted(up[4:]) == ["web:0 running", "web:0 starting", "web:1 running", "web:1 starting"]


def test_a_restart_takes_nobody_down_before_all_of_them_are_free(scene: Scene) -> None:
    scene.serve.begin(
        scene.program("db") + scene.program("web", "depends_on = ['db']") + scene.program("other")
    )
    scene.ready()
    with scene.serve.connect() as client:
        first = Asked(scene.serve.endpoint, "restart", names=["db"])
        wait_for(lambda: scene.told("db"), "db to be busy")
        second = Asked(scene.serve.endpoint, "restart", names=["all"])
        wait_for(lambda: scene.told("other"), "the restart of what has nothing to do with it")
        found = target(client, "web")
        assert [operation["operation"] for operation in found["waiting"]] == ["restart"]
        assert (found["state"], found["busy"]) == ("running", None)
        scene.let_go("db", "other", "web")
        first.result()
        assert all(result["ok"] for result in second.result()["results"])
        assert (scene.told("db"), scene.told("web"), scene.told("other")) == (2, 1, 1)


@pytest.mark.parametrize("stopped", ["web", "db"])
def test_a_stop_of_one_of_them_lets_the_restart_of_the_others_go_on(scene: Scene, stopped: str) -> None:
    scene.serve.begin(scene.program("db") + scene.program("web", "depends_on = ['db']"))
    scene.ready()
    with scene.serve.connect() as client:
        busy = "db" if stopped == "web" else "web"
        first = Asked(scene.serve.endpoint, "restart", names=[busy])
        wait_for(lambda: scene.told(busy), f"{busy} to be busy")
        second = Asked(scene.serve.endpoint, "restart", names=["all"])
        wait_for(lambda: target(client, stopped)["waiting"], "the second restart to be queued")
        stop = Asked(scene.serve.endpoint, "stop", names=[stopped])
        scene.let_go(stopped)
        stop.result()
        scene.let_go(busy)
        if stopped == "db":
            # Who depends on it waits for it, as in any other start.
            reached(client, "web", "waiting")
            client.call("start", names=["db"])
        first.result()
        results = {result["target"]: result for result in second.result()["results"]}
        assert results[stopped]["code"] == "request.cancelled"
        assert results[busy]["ok"]


def test_a_restart_given_up_on_the_way_leaves_nobody_down(scene: Scene) -> None:
    scene.serve.begin(scene.program("db") + scene.program("web", "depends_on = ['db']"))
    scene.ready()
    with scene.serve.connect() as client:
        give_up_once_told(client, scene, "restart", "web")
        scene.let_go("web")
        client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        assert (scene.started("web"), scene.started("db"), scene.told("db")) == (2, 1, 0)
        scene.let_go("db")
