"""Never fewer ready instances than `min_available`, where they have to be stopped before they are started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Asked, Serve, wait_for
from test_overlap import Client, Town

from asyncsup.errors import RemoteError

ALL = {"app:0", "app:1", "app:2"}
THREE = "instances = 3\noverlap = false"
TWO_STAY = "min_available = 2"


@pytest.fixture
def town(serve: Serve) -> Iterator[Town]:
    made = Town(serve)
    yield made
    made.close()


def last_event(town: Town) -> int:
    number: int = town.control.call("events.since")["seq"]
    return number


def fewest(town: Town, since: int, up: set[str] = ALL) -> int:
    """How many were ready when it was fewest, of those that were `up` at an event."""
    now, low = set(up), len(up)
    for event in town.control.call("events.since", {"seq": since})["events"]:
        if event["type"] == "instance.state":
            (now.add if event["to"] in {"running", "reloading"} else now.discard)(event["instance"])
            low = min(low, len(now))
    return low


def versions(town: Town) -> list[str]:
    return [instance["status_text"].partition(" ")[0] for instance in town.target["instances"]]


def have_one_down(town: Town, index: int) -> list[int | None]:
    """Let an instance end that is not tried again; returns the pids there are."""
    os.kill(town.pids[index], signal.SIGKILL)
    wait_for(lambda: town.target["instances"][index]["state"] == "failed", "it to be down")
    return [instance["pid"] for instance in town.target["instances"]]


def test_some_at_a_time_and_never_too_few(town: Town) -> None:
    town.start(THREE, patch=TWO_STAY)
    before = town.pids
    since = last_event(town)
    town.apply("v2")
    assert fewest(town, since) == 2
    assert not set(town.pids) & set(before)
    assert town.ask() == "v2"
    moved = town.pids
    town.refused("v3", "crash")
    town.wait_ready()
    # Only the first was tried.
    assert town.pids[1:] == moved[1:]
    assert town.ask() == "v2"


def test_nor_on_the_way_back(town: Town) -> None:
    town.start(THREE, patch=TWO_STAY)
    (town.folder / "uneven").touch()
    before, since = town.pids, last_event(town)
    assert town.refused("v2", "uneven").error_code == "patch.rolled_back"
    assert fewest(town, since) == 2
    assert town.pids[2] == before[2]
    wait_for(lambda: versions(town) == ["v1"] * 3, "all to be v1")


def test_nor_after_a_crash_of_the_supervisor(town: Town) -> None:
    town.start(f"{THREE}\nstart_timeout = '100s'", patch=TWO_STAY)
    (town.folder / "hesitant").touch()
    before = town.pids
    Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2", "hesitant"))
    wait_for(lambda: town.pids[1] not in {None, before[1]}, "the second to be replaced")
    supervisor = town.serve.supervisor
    town.serve.kill_supervisor()
    wait_for(lambda: town.serve.supervisor not in {0, supervisor}, "the next supervisor")
    town.again()
    wait_for(lambda: versions(town) == ["v1"] * 3, "the version before")
    town.wait_ready()
    assert fewest(town, 0, ALL - {"app:1"}) == 2
    assert town.pids[2] == before[2]


def test_nor_after_a_crash_while_one_is_being_stopped(town: Town) -> None:
    town.start(f"{THREE}\nstop_timeout = '100s'", patch=TWO_STAY)
    linger = town.folder / "linger-app:1"
    linger.touch()
    Asked(town.serve.endpoint, "patch.apply", path=town.patch("v2"))
    wait_for(lambda: town.target["instances"][1]["state"] == "stopping", "the second to be stopped")
    supervisor = town.serve.supervisor
    town.serve.kill_supervisor()
    wait_for(lambda: town.serve.supervisor not in {0, supervisor}, "the next supervisor")
    town.again()
    linger.unlink()
    wait_for(lambda: versions(town) == ["v1"] * 3, "the version before")
    town.wait_ready()
    assert fewest(town, 0, ALL - {"app:1"}) == 2


def test_one_that_is_down_has_the_first_turn(town: Town) -> None:
    town.start(f"{THREE}\nrestart = 'never'", patch=TWO_STAY)
    have_one_down(town, 1)
    since = last_event(town)
    town.apply("v2")
    assert fewest(town, since, ALL - {"app:1"}) == 2
    wait_for(lambda: versions(town) == ["v2"] * 3, "all to be v2")


def test_none_is_stopped_where_no_more_are_ready_than_have_to_be(town: Town) -> None:
    town.start(f"{THREE}\nrestart = 'never'", patch=TWO_STAY)
    pids = have_one_down(town, 1)
    with pytest.raises(RemoteError, match="of 3 instances of app 2 are ready") as caught:
        town.control.call("restart", {"names": ["app:0"], "rolling": True}, timeout=100)
    assert caught.value.error_code == "target.no_capacity"
    assert [instance["pid"] for instance in town.target["instances"]] == pids
    town.control.call("restart", {"names": ["app"], "rolling": True}, timeout=100)
    assert not set(town.pids) & set(pids)


def test_other_settings_keep_to_it_as_well(town: Town) -> None:
    def apply(more: str) -> dict[str, Any]:
        town.serve.write(town.settings(f"{THREE}\n{more}", patch=TWO_STAY))
        failed: dict[str, Any] = town.control.call("config.apply", {"wait": True}, timeout=100)["failed"]
        return failed

    town.start(THREE, patch=TWO_STAY)
    before, since = town.pids, last_event(town)
    assert apply("env = { COLOUR = 'blue' }") == {}
    after = town.pids
    assert not set(after) & set(before)
    assert fewest(town, since) == 2
    # What does not work is not taken up by anybody, and the difference is shown again.
    since = last_event(town)
    assert "app" in apply("start_timeout = '1s'\nready.http = 'http://127.0.0.1:1/'")
    town.wait_ready()
    assert town.pids[1:] == after[1:]
    assert fewest(town, since) == 2
    assert "app" in str(town.control.call("config.plan"))


def stopped(town: Town, since: int) -> list[str]:
    """Who has been stopped, in this order."""
    events = town.control.call("events.since", {"seq": since})["events"]
    return [event["instance"] for event in events if event.get("to") == "stopping"]


def test_those_that_took_up_other_settings_go_back_when_a_later_one_does_not(town: Town) -> None:
    more = f"{THREE}\nrestart = 'never'"
    town.start(more, patch=TWO_STAY)
    before, since = town.pids, last_event(town)
    first_only = "hooks.pre_start = ['sh', '-c', 'test $ASYNCSUP_INSTANCE = app:0']"
    other = f"env = {{ COLOUR = 'blue' }}\n{first_only}"
    town.serve.write(town.settings(f"{more}\n{other}", patch=TWO_STAY))
    failed = town.control.call("config.apply", {"wait": True}, timeout=100)["failed"]
    assert failed["app"]["code"] == "target.start_failed"
    town.wait_ready()
    assert not set(town.pids[:2]) & set(before)
    assert town.pids[2] == before[2]
    assert fewest(town, since) == 2
    assert stopped(town, since) == ["app:0", "app:1", "app:0"]


def test_a_stop_of_another_leaves_nobody_down_who_was_going_back(town: Town) -> None:
    more = "instances = 4\noverlap = false\nrestart = 'never'\nstop_timeout = '100s'"
    patch = f"{TWO_STAY}\nmax_parallel = 1"
    town.start(more, patch=patch)
    since = last_event(town)
    go = town.folder / "go"
    script = f"[ $ASYNCSUP_INSTANCE = app:0 ] && exit; until [ -e {go} ]; do sleep 0.02; done; exit 1"
    first_only = f"hooks.timeout = '100s'\nhooks.pre_start = ['sh', '-c', '{script}']"
    town.serve.write(town.settings(f"{more}\nenv = {{ COLOUR = 'blue' }}\n{first_only}", patch=patch))
    applying = Asked(town.serve.endpoint, "config.apply", wait=True)
    wait_for(lambda: stopped(town, since) == ["app:0", "app:1"], "the second to be replaced")
    (town.folder / "linger-app:0").touch()
    go.touch()
    wait_for(lambda: stopped(town, since) == ["app:0", "app:1", "app:0"], "the first to go back")
    stopping = Asked(town.serve.endpoint, "stop", names=["app:3"])
    wait_for(lambda: "stop" in [each["operation"] for each in town.target["waiting"]], "the stop")
    (town.folder / "linger-app:0").unlink()
    stopping.result()
    assert "app" in applying.result()["failed"]
    wait_for(lambda: [i["ready"] for i in town.target["instances"]] == [True] * 3 + [False], "the others")


@pytest.mark.parametrize("how", ["scale", "config.apply"])
def test_those_that_are_too_many_finish_what_they_have_begun(town: Town, how: str) -> None:
    town.start("instances = 3")
    town.clients = [Client(town.address, keep=keep, question=b"slow\n") for keep in (False, True) * 6]
    for client in town.clients:
        client.start()
    town.heard("v1")
    if how == "scale":
        town.control.call("scale", {"name": "app", "instances": 1}, timeout=100)
    else:
        town.serve.write(town.settings("instances = 1"))
        assert town.control.call("config.apply", {"wait": True}, timeout=100)["failed"] == {}
    assert len(town.pids) == 1
    town.unharmed()


def test_who_drains_is_not_asked_whether_it_is_alive_nor_started_again(town: Town) -> None:
    drained = "        await service.drain()\n\n"
    assert drained in town.source
    more = "        open('deaf', 'w').close()\n        await asyncio.sleep(1)\n        stop.set()\n"
    (town.root / "service.py").write_text(town.source.replace(drained, f"{drained[:-1]}{more}\n", 1))
    alive = "liveness.exec = ['sh', '-c', 'test $ASYNCSUP_INSTANCE = app:0 || ! test -e deaf']"
    often = "liveness.interval = '100ms'\nliveness.failure_threshold = 1\nliveness.timeout = '100s'"
    town.start(f"instances = 2\nrestart = 'always'\n{alive}\n{often}")
    since = last_event(town)
    town.clients = [Client(town.address, keep=True, question=b"slow\n") for _ in range(8)]
    for client in town.clients:
        client.start()
    town.heard("v1")
    town.control.call("scale", {"names": ["app"], "instances": 1}, timeout=100)
    events = town.control.call("events.since", {"seq": since})["events"]
    assert [event["reason"] for event in events if event.get("to") in {"starting", "backoff"}] == []
    assert "liveness" not in town.serve.errors()
    town.unharmed()


def test_who_waits_for_a_dependency_goes_on_waiting(serve: Serve) -> None:
    def text(colour: str) -> str:
        return (
            f'[target.db]\ncommand = "sleep 1000"\nready.exec = ["test", "-e", "{serve.folder}/go"]\n'
            'start_timeout = "1h"\n[target.web]\ncommand = "sleep 1000"\ninstances = 2\n'
            f'depends_on = ["db"]\nenv = {{ COLOUR = "{colour}" }}\n[target.web.patch]\nmin_available = 1\n'
        )

    def states() -> list[str]:
        return [i["state"] for i in control.call("status", {"names": ["web"]})["targets"][0]["instances"]]

    with serve.start(text("red")) as control:
        wait_for(lambda: states() == ["waiting"] * 2, "both to wait")
        serve.write(text("blue"))
        assert control.call("config.apply", {"wait": False}, timeout=100)["failed"] == {}
        assert states() == ["waiting"] * 2
        (serve.folder / "go").touch()
        control.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})


@pytest.mark.parametrize("how", ["scaled", "more-of-both"])
def test_one_of_all_can_always_be_spared(town: Town, how: str) -> None:
    town.start("instances = 2\noverlap = false", patch="min_available = 1")
    if how == "scaled":
        town.control.call("scale", {"names": ["app"], "instances": 1}, timeout=100)
        before = town.pids
        town.control.call("restart", {"names": ["app"], "rolling": True}, timeout=100)
    else:
        before = town.pids
        town.serve.write(town.settings(f"{THREE}\nenv = {{ COLOUR = 'blue' }}", patch=TWO_STAY))
        assert town.control.call("config.apply", {"wait": True}, timeout=100)["failed"] == {}
    assert not set(before) & set(town.pids)


def test_settings_that_have_failed_are_shown_again_after_others_were_taken_up(serve: Serve) -> None:
    def text(other: str, more: str = "") -> str:
        return (
            f'[target.other]\ncommand = "sleep 1000"\nenv = {{ COLOUR = "{other}" }}\n'
            '[target.app]\ncommand = "sleep 1000"\ninstances = 2\n'
            f"{more}[target.app.patch]\nmax_parallel = 1\n"
        )

    with serve.start(text("red")) as control:
        control.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
        serve.write(text("blue"))
        assert control.call("config.apply", {"wait": True}, timeout=100)["failed"] == {}
        serve.write(
            text("blue", "start_timeout = '500ms'\nready.exec = ['false']\nenv = { COLOUR = 'green' }\n")
        )
        assert "app" in control.call("config.apply", {"wait": True}, timeout=100)["failed"]
        assert "app" in str(control.call("config.plan"))


def test_a_commit_of_what_has_failed_tries_the_fallen_again(town: Town) -> None:
    town.start(f"{THREE}\nrestart = 'never'", patch=f'{TWO_STAY}\ncanary = 1\nrollback = "manual"')
    path = town.patch("v2", "fall", probation=100.0)
    asked = Asked(town.serve.endpoint, "patch.apply", path=path)
    wait_for(lambda: versions(town)[0] == "v2", "the canary")
    (town.folder / "fall").touch()
    answer = asked.answer()
    assert isinstance(answer, RemoteError)
    assert answer.error_code == "patch.undecided"
    (town.folder / "fall").unlink()
    since = last_event(town)
    town.control.call("patch.commit", {"id": str(town.target["undecided"])}, timeout=100)
    town.wait_ready()
    wait_for(lambda: versions(town) == ["v2"] * 3, "all to be v2")
    assert fewest(town, since, ALL - {"app:0"}) == 2
