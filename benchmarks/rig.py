"""What the benchmarks share: a supervisor to measure, the floor, and a table of ratios."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asyncsup.client import ControlClient
from asyncsup.errors import SupervisorUnreachableError

HERE = Path(__file__).parent


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="asb-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def compile_floor(into: Path) -> Path:
    """The C program; raises if there is no compiler, because a figure without its floor says nothing."""
    program = into / "stamp"
    subprocess.run(["cc", "-O2", "-o", str(program), str(HERE / "stamp.c")], check=True)
    return program


@contextlib.contextmanager
def supervisor(home: Path, text: str) -> Iterator[tuple[ControlClient, list[int]]]:
    """A running supervisor: its client, its pid and its keeper's."""
    config = home / "asyncsup.toml"
    config.write_text(text, encoding="utf-8")
    with (home / "serve.err").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "asyncsup", "-c", str(config), "serve"],
            stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
        )  # fmt: skip
        try:
            client = ControlClient(f"ipc://{home}/.asyncsup/run/control.sock")
            until(lambda: answers(client), process)
            with client:
                yield client, [client.call("supervisor.info")["pid"], process.pid]
        finally:
            process.terminate()
            process.wait(120)


def answers(client: ControlClient) -> bool:
    try:
        client.call("supervisor.info", timeout=5)
    except SupervisorUnreachableError:
        return False
    return True


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> None:
    while not condition():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the supervisor ended with status {process.returncode}")
        time.sleep(0.002)


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def row(
    what: str, ours: float, unit: str, floor: float | None = None, *, higher_is_better: bool = False
) -> None:
    """Print one line: our figure, the floor's, the ratio."""
    line = f"{what:<44} {ours:>10.2f} {unit:<6}"
    if floor is not None:
        word = "x floor"
        line += f" {floor:>10.2f} {unit:<6} {ours / floor:>8.2f} {word}"
        line += "  (higher is better)" if higher_is_better else ""
    print(line, flush=True)
