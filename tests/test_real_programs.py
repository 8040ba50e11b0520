"""Programs that know nothing of asyncsup, as the recipes in ``docs/programs.md`` run them.

The tests take both configurations, asyncsup's and the program's, from there; only folders and ports differ.
"""

from __future__ import annotations

import functools
import http.client
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, free_port, wait_for
from requirements import require_program
from test_supervisor import instance

from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

PAGE = Path(__file__).parent.parent / "docs" / "programs.md"
COLD = "Replaced without a gap"
"""The heading of the second part; `test_cold_recipes.py` runs that."""

# The programs of the test extra are beside the interpreter, some of Debian's where only root looks for them.
SEARCH_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"


@functools.cache
def recipes() -> dict[str, list[str]]:
    """The code blocks of the page's first part, by heading."""
    text, _, _ = PAGE.read_text().partition(f"\n## {COLD}\n")
    return code_blocks(text, level=2)


def code_blocks(text: str, *, level: int) -> dict[str, list[str]]:
    """By heading of that level, in small letters."""
    sections = re.split(rf"^{'#' * level} (.+)\n", text, flags=re.MULTILINE)
    blocks = re.compile(r"^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return {
        name.lower(): blocks.findall(text) for name, text in zip(sections[1::2], sections[2::2], strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a test has to know of a program.

    Attributes:
        port: the one in its recipe.
        file: what the patch changes in its root, from what to what.
        observe: what it answers over its own protocol.
        exits: how it may end when it is stopped; haproxy handles SIGTERM only some time after READY=1.
        broken: what is changed to instead, so that it cannot be taken up and the patch is undone.
        prepare: further things that must be there, given its folder.
    """

    name: str
    binary: str
    port: int
    file: str
    change: tuple[str, str]
    observe: Callable[[Path, int], str]
    before: str = "one"
    after: str = "two"
    broken: str
    told_by: str = "signal"
    folders: tuple[str, ...] = ()
    exits: tuple[str, ...] = ("exit status 0",)
    prepare: Callable[[Path], None] = lambda _: None


def by_http(_: Path, port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
        return str(answer.read().decode())


def ask_redis(_: Path, port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"CONFIG GET maxmemory\r\n")
        with connection.makefile("rb") as answer:
            value = [answer.readline() for _ in range(5)][-1]
    if not value.endswith(b"\r\n"):
        raise ConnectionError("closed in the middle of the answer")
    return value.strip().decode()


def ask_postgres(folder: Path, port: int) -> str:
    command = ["psql", "-h", str(folder / "run"), "-p", str(port), "-U", "postgres", "-XAtc", "show work_mem"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if answer.returncode != 0:
        raise ConnectionError(answer.stderr)
    return answer.stdout.strip()


def found(pattern: str) -> str:
    """A program of a pattern's folder; "" when it is not installed."""
    return next((str(path) for path in sorted(Path("/").glob(pattern), reverse=True)), "")


POSTGRES = found("usr/lib/postgresql/*/bin/postgres")


def make_cluster(folder: Path) -> None:
    user = pwd.getpwnam("postgres")
    for name in ("data", "run"):
        os.chown(folder / name, user.pw_uid, user.pw_gid)
        (folder / name).chmod(0o700)
    command = [
        str(Path(POSTGRES).with_name("initdb")),
        "--no-sync",
        "-A",
        "trust",
        "-D",
        str(folder / "data"),
    ]
    subprocess.run(
        command,
        user="postgres",
        group="postgres",
        extra_groups=[],
        cwd="/",
        check=True,
        stdout=subprocess.DEVNULL,
    )


PROGRAMS = [
    Program(
        name="redis", binary="redis-server", port=6379, file="live.conf", observe=ask_redis,
        change=("maxmemory 64mb", "maxmemory 32mb"), before=str(64 << 20), after=str(32 << 20),
        broken="maxmemory much", told_by="command", folders=("data",),
    ),
    Program(
        name="haproxy", binary="haproxy", port=8080, file="haproxy.cfg", observe=by_http,
        change=('"one"', '"two"'), broken='"one" nonsense', exits=("exit status 0", "killed by SIGTERM"),
    ),
    Program(
        name="nginx", binary="nginx", port=8080, file="nginx.conf", observe=by_http, told_by="command",
        change=('"one"', '"two"'), broken="one; nonsense",
    ),
    Program(
        name="postgresql", binary=POSTGRES, port=5432, file="postgresql.conf", observe=ask_postgres,
        change=("work_mem = 4MB", "work_mem = 8MB"), before="4MB", after="8MB", broken="work_mem = much",
        folders=("data", "run"), prepare=make_cluster,
    ),
    Program(
        name="gunicorn", binary="gunicorn", port=8000, file="gunicorn.conf.py", observe=by_http,
        change=("GREETING=one", "GREETING=two"), broken='GREETING=one", nonsense, "', told_by="command",
    ),
    Program(
        name="uvicorn", binary="uvicorn", port=8000, file="settings.py", observe=by_http,
        change=('"one"', '"two"'), broken='"one" nonsense', told_by="command",
    ),
]  # fmt: skip


class Stage:
    """A program under a real supervisor, with the page's configuration.

    Args:
        blocks: its recipe.
        kind: of its patches.
    """

    def __init__(self, serve: Serve, program: Program, blocks: list[str], kind: Kind = Kind.WARM) -> None:
        self.serve, self.program, self.port = serve, program, free_port()
        self.home = serve.folder / "srv"
        serve.folder.chmod(0o755)
        settings, *files = map(self.adapted, blocks)
        (self.name,) = re.findall(r"^\[target\.(\w+)\]", settings, flags=re.MULTILINE)
        (root,) = re.findall(r'^root = "(.+)"', settings, flags=re.MULTILINE)
        self.folder, self.root = self.home / self.name, Path(root)
        for path in (self.root, *(self.folder / name for name in program.folders)):
            path.mkdir(parents=True)
        for text in files:
            first, _, content = text.partition("\n")
            Path(first.split(" ", 1)[1]).write_text(content)
        program.prepare(self.folder)
        self.kind, self.old = kind, serve.folder / "old"
        shutil.copytree(self.root, self.old)
        serve.environ["PATH"] = SEARCH_PATH
        self.client: ControlClient = serve.start(
            f'[defaults]\nrestart_delay = "100ms"\n[patch]\ntrust = "none"\nprobation = "0s"\n{settings}'
        )
        self.build = 0

    def adapted(self, text: str) -> str:
        text = re.sub(rf"\b{self.program.port}\b", str(self.port), text.replace("/srv/", f"{self.home}/"))
        return re.sub(r"/usr/lib/postgresql/\d+/bin/postgres", POSTGRES, text)

    @property
    def now(self) -> Any:
        return instance(self.client, self.name)

    def answer(self) -> str | None:
        try:
            return self.program.observe(self.folder, self.port)
        except (OSError, http.client.HTTPException):
            return None

    def answers(self, expected: str) -> None:
        wait_for(lambda: self.answer() == expected, f"the answer {expected}", every=0.05)

    def ready(self) -> Any:
        self.client.call("wait", {"names": [self.name], "for": "ready", "timeout": 100})
        return self.now

    def patch(self, before: str, after: str) -> Any:
        """
        Raises:
            RemoteError: it was refused or undone.
        """
        self.build += 1
        new = self.serve.folder / f"new-{self.build}"
        shutil.copytree(self.old, new)
        text = (new / self.program.file).read_text()
        assert text.count(before) == 1
        (new / self.program.file).write_text(text.replace(before, after))
        package = self.serve.folder / f"{self.build}.zip"
        build_patch(
            old=self.old, new=new, output=package, name="settings", version=str(self.build),
            build=self.build, kind=self.kind, targets=[self.name], regions=["local"],
        )  # fmt: skip
        report = self.client.call("patch.apply", {"path": str(package)}, timeout=200)
        self.old = new
        return report

    def processes(self) -> list[str]:
        """Whatever runs with, in or from the program's folder; some show no command line that says so."""
        left = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                facts = (entry / "cmdline").read_bytes().decode(errors="replace")
                facts += str((entry / "cwd").readlink()) + str((entry / "fd" / "1").readlink())
            except OSError:
                continue
            if str(self.folder) in facts or (
                f"/output/{self.name}:" in facts and str(self.serve.folder) in facts
            ):
                left.append(f"{entry.name} {facts}")
        return left


def need(program: Program) -> None:
    require_program(program.binary or program.name, path=SEARCH_PATH)


@pytest.fixture(params=PROGRAMS, ids=lambda program: program.name)
def stage(serve: Serve, request: pytest.FixtureRequest) -> Iterator[Stage]:
    program = request.param
    need(program)
    if "user" in recipes()[program.name][0] and os.geteuid() != 0:
        pytest.skip("only root can start it as another user")
    made = Stage(serve, program, recipes()[program.name])
    yield made
    made.client.close()


def test_a_real_program(stage: Stage) -> None:
    program = stage.program
    before = stage.ready()
    assert stage.answer() == program.before, "it was not ready when it said so"

    with pytest.raises(RemoteError) as caught:
        stage.patch(program.change[0], program.broken)
    assert caught.value.error_code == "patch.rolled_back", caught.value.message
    stage.answers(program.before)
    report = stage.patch(*program.change)
    assert report["verdict"] == "committed"
    (told,) = report["targets"][0]["instances"]
    assert told["told_by"] == program.told_by
    stage.answers(program.after)
    assert (stage.now["pid"], stage.now["restarts"]) == (before["pid"], 0), "it was restarted"

    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: stage.now["pid"] not in {before["pid"], None}, "another process")
    after = stage.ready()
    assert after["restarts"] >= 1
    stage.answers(program.after)

    stage.client.call("stop", names=[stage.name])
    stopped = stage.now
    assert stopped["state"] == "stopped"
    assert stopped["detail"] in program.exits
    assert stage.answer() is None
    wait_for(lambda: not stage.processes(), f"the end of {stage.processes()}")


def test_every_recipe_is_run() -> None:
    assert sorted(recipes()) == sorted(program.name for program in PROGRAMS)
