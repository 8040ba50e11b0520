"""The echo service of the examples under a supervisor: its clients stay connected through cold patches."""

from __future__ import annotations

import json
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, free_port, wait_for

from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

PROGRAM = Path(__file__).parent.parent / "examples" / "echo" / "echo_service.py"
CONNECTIONS = 1000
PATCHES = 10
PATIENCE = 60.0

DIES_ONCE = "import os, pathlib; pathlib.Path('died').exists() or (pathlib.Path('died').touch(), os._exit(1))"
"""In a successor, when it has received what is handed over and has not taken it yet."""


@pytest.fixture
def room_for_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2 * CONNECTIONS), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def package(folder: Path, build: int, before: str, after: str) -> Path:
    for name, text in (("old", before), ("new", after)):
        (folder / f"{name}-{build}").mkdir()
        (folder / f"{name}-{build}" / PROGRAM.name).write_text(text)
    made = folder / f"{build}.zip"
    build_patch(
        old=folder / f"old-{build}", new=folder / f"new-{build}", output=made, name="echo",
        version=str(build), build=build, kind=Kind.COLD, targets=["echo"], regions=["local"],
    )  # fmt: skip
    return made


def say(client: socket.socket, number: int, text: bytes) -> None:
    """Say a line, and hear it with the number that it has on this connection."""
    client.sendall(text + b"\n")
    assert client.recv(100) == b"%d %s\n" % (number, text)


class Echo:
    """The service under a supervisor, and its clients."""

    def __init__(self, serve: Serve) -> None:
        self.folder = serve.folder
        self.root = serve.folder / "echo"
        self.root.mkdir()
        self.text = PROGRAM.read_text()
        (self.root / PROGRAM.name).write_text(self.text)
        self.address = ("127.0.0.1", free_port())
        command = json.dumps([sys.executable, str(self.root / PROGRAM.name)])
        self.clients: list[socket.socket] = []
        self.control = serve.start(
            f'[patch]\ntrust = "none"\nprobation = "0s"\n'
            f'[socket.echo]\nlisten = "tcp://127.0.0.1:{self.address[1]}"\n'
            f'[target.echo]\ncommand = {command}\nroot = "echo"\nprotocol = "sdk"\nsockets = ["echo"]\n'
            f'restart_delay = "50ms"\n[target.echo.limits]\nnofile = {8 * CONNECTIONS}\n'
        )
        self.control.call("wait", {"names": ["echo"], "for": "ready", "timeout": PATIENCE})

    def connect(self, count: int) -> None:
        for _ in range(count):
            self.clients.append(socket.create_connection(self.address, PATIENCE))
            say(self.clients[-1], 1, b"hello")

    def patch(self, build: int, text: str) -> None:
        made = package(self.folder, build, self.text, text)
        self.control.call("patch.apply", {"path": str(made)}, timeout=100)
        self.text = text

    def wait_alone(self) -> None:
        wait_for(lambda: not self.status["others"], "the old one to go", PATIENCE)

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.control.call("status", {"names": ["echo"]})["targets"][0]
        return found

    @property
    def pid(self) -> int:
        pid: int = self.status["instances"][0]["pid"]
        return pid

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.control.close()


@pytest.fixture
def echo(serve: Serve, room_for_descriptors: None) -> Iterator[Echo]:
    made = Echo(serve)
    yield made
    made.close()


def test_a_thousand_clients_stay_connected_through_ten_cold_patches(echo: Echo) -> None:
    echo.connect(CONNECTIONS)
    pids = {echo.pid}
    for build in range(1, PATCHES + 1):
        # Half a line is on its way while the program is replaced.
        talking = echo.clients[build]
        talking.sendall(b"hal")
        echo.patch(build, f"{echo.text}\n# {build}\n")
        echo.wait_alone()
        pids.add(echo.pid)
        talking.sendall(b"f\n")
        assert talking.recv(100) == b"%d half\n" % (build + 1)
        for client in echo.clients:
            if client is not talking:
                say(client, build + 1, b"still here")
    assert len(pids) == PATCHES + 1


def test_a_successor_that_dies_in_the_middle_of_it_leaves_everything_to_the_old_one(
    echo: Echo, serve: Serve
) -> None:
    echo.connect(10)
    old = echo.pid
    echo.patch(
        1,
        echo.text.replace(
            "            clients = json", f"            {DIES_ONCE}\n            clients = json"
        ),
    )
    echo.wait_alone()
    assert "trying again when its next successor is ready" in serve.errors()
    assert echo.status["instances"][0]["restarts"] == 1
    assert echo.pid != old
    for client in echo.clients:
        say(client, 2, b"still here")
