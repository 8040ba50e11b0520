"""The OpenRPC description says what the control API takes and answers, and nothing else."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Awaitable, Sequence
from typing import Any

import jsonschema
import pytest
from conftest import Serve

from asyncsup import control
from asyncsup.actor import Actor
from asyncsup.openrpc import openrpc
from target_sdk.protocol import Request, RequestId

DOCUMENT = openrpc()
METHODS = {method["name"]: method for method in DOCUMENT["methods"]}


class EnoughError(Exception):
    """All parameters have been read."""


class Recorder(control.Call):
    """Notes how every parameter is read, and gives each a value that will do."""

    def __init__(self) -> None:
        peer: Any = None
        super().__init__(Request(id=1, method="", params={}), peer, lambda: Actor(via="control"))
        self.found: dict[str, tuple[str | list[str], bool]] = {}
        self.choices: dict[str, Sequence[str]] = {}

    def _note(self, key: str, kind: str | list[str], *, required: bool) -> None:
        # Read twice, once to see whether it is there: it may be left out.
        self.found.setdefault(key, (kind, required))

    def string(self, key: str) -> str:
        self._note(key, "string", required=True)
        return "0" * 64

    def optional_string(self, key: str) -> str | None:
        self._note(key, "string", required=False)
        return None

    def strings(self, key: str) -> list[str]:
        self._note(key, "array", required=False)
        return []

    def boolean(self, key: str, default: bool) -> bool:
        self._note(key, "boolean", required=False)
        return default

    def optional_integer(self, key: str, *, at_most: int) -> int | None:
        self._note(key, "integer", required=False)
        return None

    def signed_integer(self, key: str, default: int, *, at_most: int) -> int:
        self._note(key, "integer", required=False)
        return default

    def seconds(self, key: str) -> float | None:
        self._note(key, "number", required=False)
        return None

    def moment(self, key: str) -> float | None:
        self._note(key, "number", required=False)
        return None

    def choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        self._note(key, "string", required=default is None)
        self.choices[key] = choices
        return default or choices[0]

    def request_id(self, key: str) -> RequestId:
        self._note(key, ["integer", "string"], required=True)
        return 1

    def array(self, key: str) -> list[Any]:
        self._note(key, "array", required=False)
        return []

    def finish(self) -> None:
        raise EnoughError


class Stub:
    """Stands for the server up to the point where all parameters are read."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(control.ControlServer, name, None)
        return method.__get__(self) if inspect.isfunction(method) else Stub()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return Stub()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return Stub()


async def until(answer: Awaitable[Any]) -> None:
    await answer


def test_every_method_is_there() -> None:
    assert METHODS.keys() == control.METHODS.keys()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_its_parameters_are_those_that_are_read(name: str) -> None:
    recorder = Recorder()
    handler: Any = control.METHODS[name].handler
    with pytest.raises(EnoughError):
        answer = handler(Stub(), recorder)
        if inspect.isawaitable(answer):
            asyncio.run(until(answer))
    described = {param["name"]: param for param in METHODS[name]["params"]}
    assert described.keys() == recorder.found.keys()
    for key, (kind, required) in recorder.found.items():
        assert described[key]["schema"]["type"] == kind, key
        # An array may be left out by the code's word; whether that makes sense is the method's.
        if kind != "array":
            assert described[key]["required"] == required, key
    for key, choices in recorder.choices.items():
        assert described[key]["schema"]["enum"] == list(choices), key


def test_results_are_as_described(serve: Serve) -> None:
    root = serve.folder / "app"
    root.mkdir()
    (root / "a.txt").write_text("one")
    client = serve.start(
        '[patch]\ntrust = "none"\n'
        '[target.web]\ncommand = ["sh", "-c", "echo hello; exec sleep 1000"]\nroot = "app"\nbuild = 100\n'
        'reload_signal = "CONT"\n'
    )
    client.call("wait", {"names": ["web"], "for": "ready"}, timeout=20)
    asked: dict[str, dict[str, Any]] = {
        "rpc.discover": {}, "supervisor.info": {}, "status": {}, "show": {"name": "web"}, "events.since": {},
        "restart": {"names": ["web"]}, "reload": {"names": ["web"]}, "scale": {"name": "web", "instances": 1},
        "signal": {"names": ["web"], "signal": "CONT"}, "wait": {"names": ["web"], "for": "ready"},
        "logs": {"name": "web"}, "logs.follow": {"timeout": 0}, "patch.prune": {}, "patch.drift": {},
        "patch.list": {}, "patch.history": {}, "audit.list": {}, "audit.verify": {},
        "target.release": {"target": "web"}, "stop": {"names": ["web"]}, "start": {"names": ["web"]},
        "shutdown": {},
    }  # fmt: skip
    for name, params in asked.items():
        result = client.call(name, params, timeout=30)
        jsonschema.validate(result, METHODS[name]["result"]["schema"])
    client.close()
    assert serve.process is not None
    serve.process.wait(60)


def test_schemas_are_schemas_and_the_command_prints_them() -> None:
    for method in DOCUMENT["methods"]:
        for schema in (method["result"]["schema"], *(param["schema"] for param in method["params"])):
            jsonschema.Draft202012Validator.check_schema(schema)
    printed = subprocess.run(
        [sys.executable, "-m", "asyncsup", "openrpc"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert json.loads(printed) == DOCUMENT
