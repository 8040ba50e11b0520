"""A function in a child process under strace: recorded, killed or failed at a system call of one's choice.

strace attaches to a child that is already there, forked and waiting; so what is counted begins with the
function, and a run costs no interpreter's start.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from conftest import alive
from requirements import not_here

_PR_SET_PTRACER: Final = 0x59616D61
_ANYBODY: Final = ctypes.c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a traced function has ended.

    Attributes:
        status: exit status; negative for a signal; 1 after an exception.
        errors: what it wrote to stderr, a traceback included.
        trace: what strace wrote, a line for each system call.
    """

    status: int
    errors: str
    trace: list[str]


def traced(action: Callable[[], None], *options: str, folder: Path) -> Run:
    """Run `action` in a child under ``strace OPTIONS``.

    Args:
        folder: for the files of this run, which the next one overwrites.
    Raises:
        AssertionError: strace could not attach.
    """
    errors, trace = folder / "errors", folder / "trace"
    waiting, go = os.pipe()
    here, is_here = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go)
        os.close(here)
        _play(action, waiting, is_here, errors)
    os.close(waiting)
    os.close(is_here)
    try:
        # What it does before it waits must not be counted one time and not another.
        os.read(here, 1)
        with _strace(pid, *options, trace=trace):
            os.write(go, b"g")
            pid, status = 0, os.waitpid(pid, 0)[1]
    finally:
        os.close(go)
        os.close(here)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return Run(
        status=os.waitstatus_to_exitcode(status),
        errors=errors.read_text() if errors.exists() else "",
        trace=trace.read_text().splitlines(),
    )


@contextlib.contextmanager
def attached(pid: int, *options: str, trace: Path) -> Iterator[None]:
    """Have a process that runs already under ``strace OPTIONS`` during the block (its threads with ``-f``).

    Args:
        trace: where to write what strace sees.
    Raises:
        AssertionError: strace could not attach.
    """
    with _strace(pid, *options, trace=trace) as strace:
        try:
            yield
        finally:
            # Of a process with threads that was killed in a call strace may wait for the end for ever; of one
            # that lives it lets go.
            strace.terminate()
            while strace.poll() is None:
                if not alive(pid):
                    strace.kill()
                time.sleep(0.01)


@contextlib.contextmanager
def _strace(pid: int, *options: str, trace: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Strace, attached to a process; the block has to see to its end."""
    with subprocess.Popen(
        ["strace", "-p", str(pid), "-o", str(trace), *options],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as strace:
        assert strace.stderr is not None
        greeting = strace.stderr.readline()
        assert b"attached" in greeting, (greeting + strace.stderr.read()).decode(errors="replace")
        yield strace
        strace.stderr.read()


@functools.cache
def why_not() -> str | None:
    """Why nothing can be traced here; None when it can."""
    if shutil.which("strace") is None:
        return "there is no strace"
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = traced(lambda: None, folder=Path(folder))
        except AssertionError as error:
            return f"strace cannot attach: {error}"
    return None if run.status == 0 else f"strace ended with {run.status}"


def require_strace() -> None:
    """Skip the test where nothing can be traced; in CI that is a failure."""
    reason = why_not()
    if reason is not None:
        not_here(reason)


def _play(action: Callable[[], None], waiting: int, is_here: int, errors: Path) -> None:
    status = 1
    try:
        os.umask(0o022)
        # Where only a parent may trace: strace is a sibling.
        _libc.prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)
        fd = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.write(is_here, b"h")
        os.close(is_here)
        if os.read(waiting, 1):
            action()
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def mark(name: str) -> None:
    """Leave a word in the trace: a write that fails, and touches nothing."""
    with contextlib.suppress(OSError):
        os.write(-1, f"mark {name}".encode())
