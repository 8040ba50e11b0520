"""What the programs in a slot write: a FIFO per stream, which the keeper holds, and the file it goes to.

All that come after one another in a slot, or run side by side in it, write to the same FIFOs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from asyncsup.compressor import Compressor
from asyncsup.config import LogConfig
from asyncsup.config.values import INSTANCE
from asyncsup.keeper_link import KeeperLink
from asyncsup.logfile import LogLimits, RotatingFile
from asyncsup.logs import OutputStream

STREAMS: Final = {"stdout": 1, "stderr": 2}
"""The descriptor a program has of each."""


class LogFiles:
    """The files that output goes to. One open file per path: two writers that do not know of each other would
    overwrite one another. It is closed when the last of them has let go."""

    def __init__(self) -> None:
        self._files: dict[Path, RotatingFile] = {}
        self._writers: Counter[Path] = Counter()
        self._compressor = Compressor()

    def open(self, path: Path, settings: LogConfig) -> RotatingFile:
        if path not in self._files:
            self._files[path] = RotatingFile(path, **self._limits(settings))
            self._files[path].take_up()
        self._writers[path] += 1
        return self._files[path]

    def limit(self, file: RotatingFile, settings: LogConfig) -> None:
        file.limit(**self._limits(settings))

    def _limits(self, settings: LogConfig) -> LogLimits:
        return {
            "max_size": settings.max_size,
            "max_files": settings.max_files,
            "max_age": settings.max_age,
            "compress": self._compressor.submit if settings.compress == "gzip" else None,
        }

    def let_go(self, path: Path) -> None:
        """One of those that have opened it writes to it no more."""
        self._writers[path] -= 1
        if self._writers[path] <= 0:
            del self._writers[path]
            if (file := self._files.pop(path, None)) is not None:
                file.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._compressor.close()


class SlotOutput:
    """The streams of one slot, opened when they are first needed.

    Args:
        slot: its name, such as ``web:0``.
        settings: where a file has no path of its own, it is in `logs`.
        fifos: the folder of the FIFOs.
        on_loss: see `OutputStream`.
    """

    def __init__(
        self,
        slot: str,
        settings: LogConfig,
        *,
        logs: Path,
        fifos: Path,
        files: LogFiles,
        keeper: KeeperLink,
        on_loss: Callable[[OutputStream, OSError], None],
    ) -> None:
        self._slot = slot
        self._settings = settings
        self._logs = logs
        self._folder = fifos
        self._fifos: dict[str, Path] = {}
        self._files = files
        self._keeper = keeper
        self._on_loss = on_loss
        self._streams: dict[str, OutputStream] = {}

    @property
    def opened(self) -> Mapping[str, OutputStream]:
        """By name; those that have been needed so far."""
        return self._streams

    def open(self, *, has_writers: bool) -> Mapping[str, OutputStream]:
        """All of them, by name.

        Args:
            has_writers: a program writes to them, whether they can be opened here or not.

        Raises:
            OSError: one cannot be opened; none is left open.
        """
        if not self._streams:
            with contextlib.ExitStack() as on_failure:
                for stream, path in self._paths().items():
                    self._open(stream, path)
                    on_failure.callback(self._close, stream, keep=has_writers)
                on_failure.pop_all()
        return self._streams

    def _paths(self) -> dict[str, Path]:
        settings = self._settings
        name, _, index = self._slot.rpartition(":")
        paths = {"stdout": settings.stdout or f"{self._logs}/{name}.{index}.log"}
        if settings.stderr != "stdout":
            paths["stderr"] = settings.stderr or f"{self._logs}/{name}.{index}.err.log"
        return {stream: Path(str(path).replace(INSTANCE, index)) for stream, path in paths.items()}

    def _open(self, stream: str, path: Path) -> None:
        name = self._held_name(stream)
        held = self._keeper.take(name)
        with contextlib.ExitStack() as on_failure:
            file = self._files.open(path, self._settings)
            on_failure.callback(self._files.let_go, path)
            opened = OutputStream(
                self.fifo(stream),
                file,
                instance=self._slot,
                stream=stream,
                format_=self._settings.format,
                held=held,
                on_loss=self._on_loss,
            )
            if held is None:
                on_failure.callback(opened.close)
                self._keeper.hold(name, opened.fileno())
            on_failure.pop_all()
        self._streams[stream] = opened

    def _close(self, stream: str, *, keep: bool) -> None:
        closed = self._streams.pop(stream)
        closed.close(keep=keep)
        self._files.let_go(closed.file.path)
        if not keep:
            self._keeper.drop(self._held_name(stream))

    def _held_name(self, stream: str) -> str:
        """What the keeper knows a FIFO by."""
        return f"output/{self._slot}.{stream}"

    def fifo(self, stream: str) -> Path:
        if stream not in self._fifos:
            self._fifos[stream] = Path(f"{self._folder}/{self._slot}.{stream}")
        return self._fifos[stream]

    @contextlib.contextmanager
    def child_ends(self, *, has_writers: bool) -> Iterator[dict[str, int]]:
        """Descriptors for a program that is spawned meanwhile, by the name of the stream.

        Raises:
            OSError: as `open` does.
        """
        with contextlib.ExitStack() as ends:
            descriptors = {}
            for name, stream in self.open(has_writers=has_writers).items():
                descriptors[name] = stream.open_child_end()
                ends.callback(os.close, descriptors[name])
            yield descriptors

    def drain(self) -> None:
        """Take what a program that has ended has left in them."""
        for stream in self._streams.values():
            stream.drain()

    def configure(self, settings: LogConfig, *, has_writers: bool) -> None:
        """Take other settings; a program that writes notices nothing.

        Args:
            has_writers: there is one.
        """
        before, self._settings = self._settings, settings
        if before.stderr != settings.stderr:
            self.close(keep=has_writers)
            return
        paths = self._paths()
        for name, stream in self._streams.items():
            old = stream.file
            # One that was configured away while the process has it goes where the other does.
            file = self._files.open(paths.get(name, paths["stdout"]), settings)
            if file is not old or before.format != settings.format:
                stream.redirect(file, settings.format)
            self._files.limit(file, settings)
            self._files.let_go(old.path)

    def close(self, *, keep: bool) -> None:
        """Let go of them.

        Args:
            keep: a program goes on writing; what it writes stays in the FIFOs.
        """
        for stream in list(self._streams):
            self._close(stream, keep=keep)

    def take_back(self, pid: int | None, *, has_writers: bool) -> None:
        """Open what an earlier supervisor had open: where a process writes to, or has written to, wherever
        that is still to be had.

        Args:
            pid: of the program in the slot, which is known to be ours; None if there is none.
        """
        held = self._keeper.held
        if self._streams or not (has_writers or any(self._held_name(stream) in held for stream in STREAMS)):
            return
        for stream in STREAMS:
            if pid is None or not (stream == "stdout" or self._settings.stderr != "stdout"):
                continue
            if self._held_name(stream) not in held and not self.fifo(stream).exists():
                self._take_from(pid, stream)
        self.open(has_writers=has_writers)
        if "stderr" not in self._streams and (
            self._held_name("stderr") in held or self.fifo("stderr").exists()
        ):
            # It was configured to have one of its own when the process was started.
            self._open("stderr", self._streams["stdout"].file.path)

    def _take_from(self, pid: int, stream: str) -> None:
        """Somebody has tidied up: the process itself has the FIFO, if it is the one we gave it."""
        with contextlib.suppress(OSError):
            link = Path(f"/proc/{pid}/fd/{STREAMS[stream]}")
            is_ours = str(link.readlink()) == f"{self.fifo(stream)} (deleted)"
            if is_ours and stat.S_ISFIFO(link.stat().st_mode):
                descriptor = os.open(link, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._keeper.held[self._held_name(stream)] = descriptor
                self._keeper.hold(self._held_name(stream), descriptor)
