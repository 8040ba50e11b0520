"""What comes in the place of a supervisor that is replaced: it is asked whether it would start at all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from asyncsup import __version__, keeper
from asyncsup.child import SpawnSpec, spawn
from asyncsup.config import Config
from asyncsup.errors import ReexecError, SpawnError
from asyncsup.restart import Exit

CHECK_SECONDS: Final = 30.0
"""How long a new program may take to say that it would start."""


class Successor(msgspec.Struct, frozen=True, kw_only=True):
    """A program that has passed its check.

    Attributes:
        python, keeper: what the keeper becomes.
        command: what starts the supervisor.
    """

    version: str
    python: str
    keeper: str
    command: Sequence[str]


def own_command() -> list[str]:
    """What started this process: the interpreter, its options, the program, and the arguments of `serve`."""
    command = [sys.executable, *sys.orig_argv[1:]]
    return command[:-2] if command[-2] == "--keeper" else command


def describe(config: Config) -> dict[str, Any]:
    """The answer to `serve --check`: this program would start, and what there is to know about it.

    Raises:
        ReexecError: its keeper does not even start.
    """
    import asyncsup.control  # noqa: F401, PLC0415 - what cannot be imported would not start

    script = str(Path(keeper.__file__).resolve())
    result = subprocess.run(
        [sys.executable, "-I", "-S", script],
        capture_output=True,
        text=True,
        timeout=CHECK_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        raise ReexecError(f"{script} does not start: {result.stderr.strip() or result.returncode}")
    return {
        "version": __version__,
        "python": sys.executable,
        "keeper": script,
        "targets": len(config.targets),
    }


async def examine(program: str | None) -> Successor:
    """Ask a program whether it would start in place of this one.

    Args:
        program: the path of an `asyncsup`; None for the one this process was started from, as it is now.

    Raises:
        ReexecError: it would not; the message has its own words.
    """
    command = own_command()
    if program is not None:
        command = [program, *command[len(sys.orig_argv) - len(sys.argv) + 1 :]]
    if program is not None and not os.access(program, os.X_OK):
        raise ReexecError(f"{program} is not an executable file", program=program)
    status, text, errors = await _answer([*command, "--check", "--json"])
    try:
        answer = json.loads(text)
        found = Successor(
            version=answer["version"], python=answer["python"], keeper=answer["keeper"], command=command
        )
    except (ValueError, TypeError, KeyError):
        found = None
    if status.status != 0 or found is None:
        words = errors.strip() or text.strip() or str(status)
        raise ReexecError(f"the new program would not start, so nothing has changed: {words}")
    return found


async def _answer(command: Sequence[str]) -> tuple[Exit, str, str]:
    """Run a command; how it ended and what it wrote."""
    finished: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
    outputs = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdout", "stderr")]
    try:
        child = spawn(
            SpawnSpec(
                command=command, directory=Path.cwd(), env=os.environ, stdout=outputs[0], stderr=outputs[1]
            )
        )
        child.on_exit(lambda ended: None if finished.done() else finished.set_result(ended))
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                ended = await finished
        except TimeoutError:
            raise ReexecError(f"the new program has said nothing for {CHECK_SECONDS:g} s") from None
        finally:
            if not finished.done() or finished.cancelled():
                child.signal_group(signal.SIGKILL)
        texts = [os.pread(fd, 1 << 20, 0).decode("utf-8", "replace") for fd in outputs]
    except SpawnError as error:
        raise ReexecError(
            f"the new program would not start, so nothing has changed: {error.message}"
        ) from None
    finally:
        for fd in outputs:
            os.close(fd)
    return ended, texts[0], texts[1]
