"""Groups of targets, and the number of instances, changed while everything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve
from test_supervisor import QUICK, SLEEPER, fails, target

from asyncsup.client import ControlClient
from asyncsup.config import parse_config
from asyncsup.errors import ConfigError

GROUPED = (
    f"{QUICK}[target.db]\n{SLEEPER}[target.worker-a]\n{SLEEPER}[target.worker-b]\n{SLEEPER}"
    "[group.backend]\ntargets = ['db', 'worker-b']\n[group.workers]\ntargets = ['worker*']\n"
)


def pids(client: ControlClient, name: str) -> list[Any]:
    return [instance["pid"] for instance in target(client, name)["instances"]]


def test_a_group_is_a_name_for_its_targets(serve: Serve) -> None:
    client = serve.start(GROUPED)
    client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
    client.call("stop", names=["backend"])
    states = {t["name"]: t["state"] for t in client.call("status")["targets"]}
    assert states == {"db": "stopped", "worker-a": "running", "worker-b": "stopped"}
    named = [t["name"] for t in client.call("status", names=["workers:0", "db"])["targets"]]
    assert named == ["db", "worker-a", "worker-b"]
    error = fails(client, "stop", names=["backen"])
    assert error.message == "no target or instance 'backen'; did you mean 'backend'?"
    client.close()


@pytest.mark.parametrize(
    ("group", "problem"),
    [
        ("targets = ['dbx']", 'there is no target "dbx"'),
        ("targets = []", "has no targets"),
        ("target = ['db']", "unknown key"),
    ],
)
def test_a_group_that_is_wrong_is_named(group: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"[target.db]\n{SLEEPER}[group.g]\n{group}\n", path=Path("/etc/asyncsup.toml"))
    assert problem in caught.value.message


def test_a_group_and_a_target_cannot_have_one_name() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f"[target.DB]\n{SLEEPER}[group.db]\ntargets = ['DB']\n", path=Path("/etc/a.toml"))
    assert 'there is a target "DB"' in caught.value.message


def test_scaling_starts_and_stops_only_the_difference(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}instances = 2\n")
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    before = pids(client, "web")
    assert client.call("scale", name="web", instances=4) == {"target": "web", "instances": 4}
    assert pids(client, "web")[:2] == before
    assert all(instance["ready"] for instance in target(client, "web")["instances"])
    client.call("scale", name="web", by=-3)
    assert pids(client, "web") == before[:1]
    client.call("scale", name="web", instances=0)
    assert pids(client, "web") == []
    assert target(client, "web")["state"] == "stopped"
    client.close()


def test_a_number_that_was_set_outlives_the_supervisor_until_another_is_configured(serve: Serve) -> None:
    text = f"{QUICK}[target.web]\n{SLEEPER}"
    client = serve.start(text)
    client.call("scale", name="web", by=2)
    client.close()
    assert serve.stop() == 0
    client = serve.start()
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 60})
    assert len(pids(client, "web")) == 3
    client.close()
    assert serve.stop() == 0
    client = serve.start(f"{text}instances = 2\n")
    assert len(pids(client, "web")) == 2
    client.close()


def test_a_number_counts_for_later_supervisors_although_a_new_instance_has_failed(serve: Serve) -> None:
    command = """command = ["sh", "-c", "[ ${instance} = 0 ] && exec sleep 600"]"""
    client = serve.start(f"{QUICK}[target.web]\n{command}\nrestart = 'never'\nmin_uptime = '1h'\n")
    assert fails(client, "scale", name="web", instances=2).error_code == "target.start_failed"
    assert len(pids(client, "web")) == 2
    client.close()
    assert serve.stop() == 0
    client = serve.start()
    assert len(pids(client, "web")) == 2
    client.close()


def test_scaling_a_stopped_target_starts_nothing(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}autostart = false\n")
    client.call("scale", name="web", instances=3)
    assert pids(client, "web") == [None] * 3
    client.call("start", names=["web"])
    assert None not in pids(client, "web")
    client.close()


def test_instances_that_would_share_a_log_are_refused(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}log.stdout = 'web.log'\n")
    error = fails(client, "scale", name="web", instances=2)
    assert "2 instances would share; put ${instance} into its name" in error.message
    assert "say how many" in fails(client, "scale", name="web").message
    assert "must be from 0 to 10000, would be -4" in fails(client, "scale", name="web", by=-5).message
    client.close()


def test_several_are_scaled_at_once_or_none_where_one_cannot_be(serve: Serve) -> None:
    client = serve.start(
        f"{QUICK}[target.a]\n{SLEEPER}[target.b]\n{SLEEPER}instances = 2\n"
        f"[target.one]\n{SLEEPER}log.stdout = 'one.log'\n[target.out]\n{SLEEPER}log.stdout = '/dev/stdout'\n"
        "[group.both]\ntargets = ['a', 'b']\n"
    )

    def counts() -> list[int]:
        return [len(found["instances"]) for found in client.call("status")["targets"]]

    def results(*names: str, **wish: int) -> list[dict[str, Any]]:
        return list(client.call("scale", {"names": list(names), **wish})["results"])

    assert results("both", "out", instances=3) == [
        {"target": name, "instances": 3, "ok": True, "detail": ""} for name in ("a", "b", "out")
    ]
    assert [found["instances"] for found in results("[ab]", by=-1)] == [2, 2]
    assert "one writes to" in fails(client, "scale", names=["all"], instances=2).message
    assert "would be -1" in fails(client, "scale", names=["a", "out"], by=-3).message
    assert "give one of" in fails(client, "scale", names=["a"], name="b", by=1).message
    assert "give one of" in fails(client, "scale", by=1).message
    assert "means 2 targets" in fails(client, "scale", name="both", by=1).message
    assert fails(client, "scale", names=["a", "none"], by=1).error_code == "target.not_found"
    assert counts() == [2, 2, 1, 3]

    def command(*words: str) -> Any:
        command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "--json", *words]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert command("scale", "a", "1") == {"target": "a", "instances": 1}
    assert [found["target"] for found in command("scale", "both", "+1")["results"]] == ["a", "b"]
    assert [found["name"] for found in command("show", "both", "out")["targets"]] == ["a", "b", "out"]
    assert command("show", "a:0")["name"] == "a"
    assert client.call("supervisor.info")["groups"] == {"both": ["a", "b"]}
    client.close()


def test_one_of_several_that_does_not_come_up_is_said_and_the_others_do(serve: Serve) -> None:
    broken = """command = ["sh", "-c", "[ ${instance} = 0 ] && exec sleep 600"]"""
    client = serve.start(
        f"{QUICK}[target.a]\n{SLEEPER}\n[target.b]\n{broken}\nrestart = 'never'\nmin_uptime = '1h'\n"
    )
    command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "scale", "a", "b", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    good, bad = done.stdout.splitlines()
    assert good == "a has 2 instances"
    assert bad.startswith("b has 2 instances; failed: ")
    client.close()


def test_the_command_takes_numbers_with_and_without_a_sign(serve: Serve) -> None:
    client = serve.start(f"{QUICK}[target.web]\n{SLEEPER}")

    def scale(number: str) -> str:
        command = [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "scale", "web", number]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert scale("3") == "web has 3 instances"
    assert scale("-2") == "web has 1 instance"
    assert scale("+1") == "web has 2 instances"
    client.close()
