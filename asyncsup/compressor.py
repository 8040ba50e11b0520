"""Compresses rotated log files, one at a time, in a process of its own at the lowest priority.

Not in a thread: one of low priority that holds the interpreter's lock would keep the event loop waiting. The
process reads one descriptor and writes another; what is called how is this side's business alone. It ends
together with the supervisor. A result that is complete and on disk gets its name by a rename, and only then
the file goes that it was made of: at every instant a reader finds one of the two, or both and knows it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import deque
from functools import partial
from pathlib import Path

from asyncsup import logarchive
from asyncsup.child import Child, SpawnSpec, out_of_the_way, spawn
from asyncsup.errors import SpawnError
from asyncsup.filefacts import FileFacts, look
from asyncsup.logfile import RotatingFile, to_read
from asyncsup.restart import Exit
from asyncsup.safe_open import safe_open

log = logging.getLogger("asyncsup.logs")


class Compressor:
    """One for all log files of a supervisor."""

    def __init__(self) -> None:
        self._waiting: deque[RotatingFile] = deque()
        self._child: Child | None = None

    def submit(self, file: RotatingFile) -> None:
        """Compress what has been rotated of this file, as soon as it has its turn."""
        if file not in self._waiting:
            self._waiting.append(file)
        self._go_on()

    def close(self) -> None:
        """Give up; the next supervisor begins anew with the file that was under way."""
        if self._child is None:
            return
        self._child.kill_and_reap()
        self._child = None
        self._waiting[0].part.unlink(missing_ok=True)
        self._waiting.clear()

    def _go_on(self) -> None:
        while self._child is None and self._waiting:
            file = self._waiting[0]
            source = file.to_compress()
            if source is None or not self._start(file, source):
                self._waiting.popleft()

    def _start(self, file: RotatingFile, path: Path) -> bool:
        with contextlib.ExitStack() as opened:
            try:
                source = opened.enter_context(to_read(path))
                file.part.unlink(missing_ok=True)
                part, _ = safe_open(file.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                opened.callback(os.close, part)
                status = os.fstat(source)
                os.fchown(part, status.st_uid, status.st_gid)
                os.fchmod(part, status.st_mode & 0o777)
                null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                opened.callback(os.close, null)
                facts = look(f"/proc/self/fd/{source}")
                assert facts is not None
                moved = out_of_the_way(os.dup(source))
                opened.callback(os.close, moved)
                program = [sys.executable, "-I", "-S", logarchive.__file__]
                self._child = spawn(
                    SpawnSpec(
                        command=[*program, str(os.getpid()), *map(str, facts.identity)],
                        directory=Path("/"),
                        env={},
                        stdout=part,
                        stderr=null,
                        descriptors={logarchive.SOURCE_FD: moved},
                    )
                )
            except (OSError, SpawnError) as error:
                self._failed(file, str(error))
                return False
        self._child.on_exit(partial(self._ended, file, facts))
        return True

    def _ended(self, file: RotatingFile, facts: FileFacts, ended: Exit) -> None:
        self._child = None
        why = "" if ended.status == 0 else f"the process that does it ended with {ended}"
        try:
            if not why:
                os.utime(file.part, (facts.modified, facts.modified), follow_symlinks=False)
                file.put_compressed(facts.identity)
        except OSError as error:
            why = str(error)
        if why:
            self._failed(file, why)
            self._waiting.popleft()
        self._go_on()

    def _failed(self, file: RotatingFile, why: str) -> None:
        """The file stays as it is; it has another turn after the next rotation."""
        log.warning("%s: not compressed: %s", file.path, why)
        with contextlib.suppress(OSError):
            file.part.unlink(missing_ok=True)
