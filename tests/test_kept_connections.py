"""The echo service of the examples under a supervisor: its clients stay connected through cold patches."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Serve, wait_for

from asyncsup.client import ControlClient
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

PROGRAM = Path(__file__).parent.parent / "examples" / "echo" / "echo_service.py"
CONNECTIONS = 1000
PATCHES = 10
PATIENCE = 30.0


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


def test_a_thousand_clients_stay_connected_through_ten_cold_patches(
    serve: Serve, room_for_descriptors: None
) -> None:
    root = serve.folder / "echo"
    root.mkdir()
    shutil.copy(PROGRAM, root)
    text = PROGRAM.read_text()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    command = json.dumps([sys.executable, str(root / PROGRAM.name)])
    settings = (
        f'[patch]\ntrust = "none"\nprobation = "0s"\n'
        f'[socket.echo]\nlisten = "tcp://127.0.0.1:{address[1]}"\n'
        f'[target.echo]\ncommand = {command}\nroot = "echo"\nprotocol = "sdk"\nsockets = ["echo"]\n'
        f"[target.echo.limits]\nnofile = {8 * CONNECTIONS}\n"
    )
    clients: list[socket.socket] = []
    with serve.start(settings) as control:
        control.call("wait", {"names": ["echo"], "for": "ready", "timeout": PATIENCE})
        try:
            for _ in range(CONNECTIONS):
                clients.append(socket.create_connection(address, PATIENCE))
                say(clients[-1], 1, b"hello")
            pids = {pid_of(control)}
            for build in range(1, PATCHES + 1):
                # Half a line is on its way while the program is replaced.
                clients[build].sendall(b"hal")
                made = package(serve.folder, build, text, after := f"{PROGRAM.read_text()}\n# {build}\n")
                control.call("patch.apply", {"path": str(made)}, timeout=60)
                text = after
                wait_for(lambda: not others_of(control), "the old one to go", PATIENCE)
                pids.add(pid_of(control))
                clients[build].sendall(b"f\n")
                assert clients[build].recv(100) == b"%d half\n" % (build + 1)
                for client in clients[:build] + clients[build + 1 :]:
                    say(client, build + 1, b"still here")
            assert len(pids) == PATCHES + 1
        finally:
            for client in clients:
                client.close()


def pid_of(control: ControlClient) -> int:
    pid: int = control.call("status", {"names": ["echo"]})["targets"][0]["instances"][0]["pid"]
    return pid


def others_of(control: ControlClient) -> list[object]:
    others: list[object] = control.call("status", {"names": ["echo"]})["targets"][0]["others"]
    return others
