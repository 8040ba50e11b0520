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
    assert versions(town) == ["v1"] * 3


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


def test_one_that_is_down_has_the_first_turn(town: Town) -> None:
    town.start(f"{THREE}\nrestart = 'never'", patch=TWO_STAY)
    have_one_down(town, 1)
    since = last_event(town)
    town.apply("v2")
    assert fewest(town, since, ALL - {"app:1"}) == 2
    assert versions(town) == ["v2"] * 3


def test_none_is_stopped_where_no_more_are_ready_than_have_to_be(town: Town) -> None:
    town.start(f"{THREE}\nrestart = 'never'", patch=TWO_STAY)
    pids = have_one_down(town, 1)
    with pytest.raises(RemoteError, match="2 of 3 instances of app are ready") as caught:
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


def test_those_that_took_up_other_settings_go_back_when_a_later_one_does_not(town: Town) -> None:
    town.start(THREE, patch=TWO_STAY)
    before, since = town.pids, last_event(town)
    first_only = "start_timeout = '2s'\nready.exec = ['sh', '-c', 'test $ASYNCSUP_INSTANCE = app:0']"
    other = f"env = {{ COLOUR = 'blue' }}\n{first_only}"
    town.serve.write(town.settings(f"{THREE}\n{other}", patch=TWO_STAY))
    failed = town.control.call("config.apply", {"wait": True}, timeout=100)["failed"]
    assert failed["app"]["code"] == "target.start_failed"
    town.wait_ready()
    assert not set(town.pids[:2]) & set(before)
    assert town.pids[2] == before[2]
    assert fewest(town, since) == 2
    moves = [
        e["instance"]
        for e in town.control.call("events.since", {"seq": since})["events"]
        if e.get("to") == "stopping"
    ]
    assert moves == ["app:0", "app:1", "app:0"]


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
