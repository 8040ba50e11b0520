"""A control group (cgroup v2) for each instance: no fork leads out of it, and its limits hold for all in it.

Below a folder of the cgroup file system that was given to asyncsup, each supervisor has one of its own, named
after its state directory, and in that one for each instance, named after it (names of instances have a colon,
those of the kernel's files none):

    DELEGATED/asyncsup.1f0c3a52/              of this supervisor
                               /supervisor/   it and its keeper, where they were in DELEGATED themselves
                               /web:0/        an instance

They are the kernel's, so they outlive every supervisor; the next one finds its own by their names. All of it
is optional: where the host does not allow it, process groups are what there is, and `Cgroups.why` says why.
See docs/design/0016-control-groups.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import select
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from asyncsup.errors import CgroupUnavailableError

log = logging.getLogger("asyncsup.cgroups")

CONTROLLERS: Final[Mapping[str, str]] = {
    "memory": "memory", "memory_high": "memory", "cpus": "cpu", "cpu_weight": "cpu", "pids": "pids",
}  # fmt: skip
"""The keys of `.limits` that are a control group's, and the controller each needs."""
ACCOUNTED: Final = ("memory", "pids")
"""Controllers that are wanted without a limit, to see what an instance takes; CPU time is seen anyhow."""
CPU_PERIOD_USEC: Final = 100_000
KILL_ROUNDS: Final = 100
"""So often whoever was forked meanwhile is killed as well, where the kernel cannot kill a group at once."""
SUPERVISOR: Final = "supervisor"
_DELEGATED: Final = ("user.delegate", "trusted.delegate")
"""Extended attributes by which systemd says that a control group is its service's own."""


class _Mount(NamedTuple):
    point: Path
    root: str
    """Which control group is seen at ``point``."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What the processes of an instance take together; None where the kernel does not count it.

    Attributes:
        memory: bytes, page cache included.
        cpu: seconds, since the group was made.
        oom_kills: how many of them the kernel has killed because the limit of memory was reached.
    """

    memory: int | None
    cpu: float | None
    processes: int | None
    oom_kills: int | None

    def to_json(self) -> dict[str, Any]:
        return {
            "memory": self.memory,
            "cpu": self.cpu,
            "processes": self.processes,
            "oom_kills": self.oom_kills,
        }


class Cgroup:
    """The control group of one instance. It may have vanished: then it has no processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- setting up -----------------------------------------------------------------------------------------

    def limit(self, limits: Mapping[str, float]) -> None:
        """Set every limit, also those that are not in ``limits`` but were set before: to none.

        Raises:
            OSError: the kernel refuses one.
        """
        for key, file, default in (
            ("memory", "memory.max", "max"),
            ("memory_high", "memory.high", "max"),
            ("cpus", "cpu.max", f"max {CPU_PERIOD_USEC}"),
            ("cpu_weight", "cpu.weight", "100"),
            ("pids", "pids.max", "max"),
        ):
            value = limits.get(key, -1)
            if value < 0:
                with contextlib.suppress(FileNotFoundError, PermissionError):  # the controller is not there
                    _write(self.path / file, default)
            elif key == "cpus":
                _write(self.path / file, f"{max(1000, round(value * CPU_PERIOD_USEC))} {CPU_PERIOD_USEC}")
            else:
                _write(self.path / file, str(int(value)))

    # --- looking --------------------------------------------------------------------------------------------

    @property
    def populated(self) -> bool:
        """Whether a process that has not ended is in it, or below it."""
        return _fields(self.path / "cgroup.events").get("populated", 0) == 1

    @property
    def oom_kills(self) -> int:
        return _fields(self.path / "memory.events").get("oom_kill", 0)

    def processes(self) -> list[int]:
        """The pids of those in it; not of what is below."""
        # 0 is one that cannot be seen from our PID namespace.
        return [int(pid) for pid in _read(self.path / "cgroup.procs").split() if pid != "0"]

    def usage(self) -> Usage:
        memory, processes = _read(self.path / "memory.current"), _read(self.path / "pids.current")
        cpu = _fields(self.path / "cpu.stat").get("usage_usec")
        events = _fields(self.path / "memory.events")
        return Usage(
            memory=int(memory) if memory else None,
            cpu=None if cpu is None else cpu / 1e6,
            processes=int(processes) if processes else len(self.processes()),
            oom_kills=events.get("oom_kill"),
        )

    # --- ending ---------------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to every process in it; whoever forks meanwhile may be missed."""
        for pid in self.processes():
            # From here on the number cannot come to mean another process, and it is still in here.
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    if pid in self.processes():
                        signal.pidfd_send_signal(pidfd, number)
                finally:
                    os.close(pidfd)

    def kill(self) -> None:
        """SIGKILL to all that are in it and below, also to those they are forking at this moment."""
        try:
            _write(self.path / "cgroup.kill", "1")
        except FileNotFoundError:
            # A kernel before 5.14, or the group is gone, and with it everybody.
            for _ in range(KILL_ROUNDS):
                if not self.populated:
                    return
                self.signal(signal.SIGKILL)
        except OSError as error:
            log.error("%s cannot be killed: %s", self.path, error.strerror)  # noqa: TRY400 - foreseen

    def when_empty(self, callback: Callable[[], None]) -> None:
        """Call back once no process is left in it; at once when that is so already. Nothing polls."""
        try:
            events = os.open(self.path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            callback()
            return
        loop = asyncio.get_running_loop()
        # The kernel reports a change as "priority", which event loops do not ask for; an epoll between does.
        watch = select.epoll()
        watch.register(events, select.EPOLLPRI)

        def look() -> bool:
            try:
                return b"populated 1" in os.pread(events, 4096, 0)
            except OSError:  # removed
                return False

        def changed() -> None:
            if not look():
                loop.remove_reader(watch)
                watch.close()
                os.close(events)
                callback()

        loop.add_reader(watch, changed)
        changed()

    def remove(self) -> bool:
        """Remove it, and what its processes have made below it; False while there are any."""
        if not self.path.is_dir():
            return True
        for below in _below(self.path):
            Cgroup(below).remove()
        try:
            self.path.rmdir()
        except OSError as error:
            return error.errno == errno.ENOENT
        return True


class Cgroups:
    """Those of one supervisor.

    Attributes:
        base: where those of the instances are; None when there can be none.
        controllers: those that can be had for limits.
        why: why there are none, or what is missing; for people.
    """

    def __init__(self, configured: Path | None, state_dir: Path) -> None:
        """Args: configured: where to make them, instead of the group that this process is in."""
        self.base: Path | None = None
        self.controllers: frozenset[str] = frozenset()
        self.why = ""
        self._name = f"asyncsup.{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:8]}"
        self._moves_itself = configured is None
        try:
            root = self._own() if configured is None else _checked(configured)
            base = root / self._name
            base.mkdir(exist_ok=True)
            self._root = root
            self._try_out(base)
        except _UnusableError as error:
            self.why = str(error)
            return
        except OSError as error:
            self.why = f"{error.filename or 'its control group'}: {error.strerror}"
            return
        self.base = base
        self.controllers = frozenset(_read(root / "cgroup.controllers").split()) & set(CONTROLLERS.values())
        for controller in ACCOUNTED:
            if controller in self.controllers:
                self._enable(controller)

    def _own(self) -> Path:
        """The folder of the control group that this process is in, if it was given to it.

        Raises:
            _UnusableError: there is none, or it belongs to somebody else.
        """
        path = next(
            (line[3:] for line in _read(Path("/proc/self/cgroup")).split("\n") if line[:3] == "0::"), ""
        )
        mount = next((mount for mount in _mounts() if _is_below(path, mount.root)), None)
        if not path or mount is None:
            raise _UnusableError("there is no cgroup v2 here")
        top = path == mount.root
        folder = mount.point / path.removeprefix(mount.root).lstrip("/")
        if folder.name == SUPERVISOR and folder.parent.name == self._name:
            return folder.parent.parent  # where an earlier supervisor has moved us, or our keeper
        if not (folder / "cgroup.events").exists():
            raise _UnusableError("it runs in the root of all control groups, which nobody has given to it")
        if not top and not _is_marked(folder) and _is_marked(folder.parent):
            folder = folder.parent  # systemd's DelegateSubgroup
        if not all(
            os.access(folder / name, os.W_OK) for name in ("", "cgroup.procs", "cgroup.subtree_control")
        ):
            raise _UnusableError(f"{folder} may not be written to")
        if os.geteuid() == 0 and not top and not _is_marked(folder):
            # Root may write everywhere; that does not make it root's to use.
            raise _UnusableError(f"{folder} was not delegated (systemd: Delegate=yes)")
        return folder

    def _try_out(self, base: Path) -> None:
        """Put a process into a group, as is done with instances: it takes more than a folder to write to.

        Raises:
            OSError, _UnusableError: it does not work.
        """
        probe = Cgroup(base / "probe")
        probe.path.mkdir(exist_ok=True)
        try:
            script = 'echo 0 > "$1/cgroup.procs"'
            null = (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0)
            arguments = ["/bin/sh", "-c", script, "sh", str(probe.path)]
            pid = os.posix_spawn("/bin/sh", arguments, os.environ, file_actions=[null], setsigmask=())
            if os.waitpid(pid, 0)[1] != 0:
                raise _UnusableError(
                    f"no process may be moved from the group asyncsup runs in into {base}: "
                    "it has to be started below the group it was given"
                )
        finally:
            probe.remove()

    def _enable(self, controller: str) -> bool:
        """Have a controller for the instances; False, and said, when it cannot be had."""
        assert self.base is not None
        for folder in (self._root, self.base):
            if controller in _read(folder / "cgroup.subtree_control").split():
                continue
            try:
                try:
                    _write(folder / "cgroup.subtree_control", f"+{controller}")
                except OSError as error:
                    if error.errno != errno.EBUSY or folder != self._root or not self._moves_itself:
                        raise
                    # A group that shares out resources among others has no processes itself.
                    self._move_ourselves()
                    _write(folder / "cgroup.subtree_control", f"+{controller}")
            except OSError as error:
                self.controllers -= {controller}
                who = " (other processes are in it)" if error.errno == errno.EBUSY else ""
                self.why = f"{folder}: the controller {controller} cannot be had: {error.strerror}{who}"
                log.warning("%s", self.why)
                return False
        return True

    def _move_ourselves(self) -> None:
        """Into a group beside those of the instances, together with our keeper."""
        assert self.base is not None
        group = self.base / SUPERVISOR
        group.mkdir(exist_ok=True)
        ours = {os.getpid(), os.getppid()}
        for pid in Cgroup(self._root).processes():
            if pid in ours:
                _write(group / "cgroup.procs", str(pid))

    # --- what instances ask for -----------------------------------------------------------------------------

    def path_of(self, name: str) -> Path | None:
        """Where the group of an instance is, or would be."""
        return None if self.base is None else self.base / name

    def require(self, mode: str, limits: Mapping[str, float]) -> None:
        """Refuse what cannot be had.

        Raises:
            CgroupUnavailableError: says what is missing, and why.
        """
        if mode in {"off", "optional"}:
            return
        asked = [key for key, value in limits.items() if value >= 0]
        if self.base is None:
            if mode == "required" or asked:
                needs = f"limits.{asked[0]} needs" if asked else 'cgroup = "required" needs'
                raise CgroupUnavailableError(
                    f"{needs} a control group, and there is none to be had: {self.why}; "
                    'cgroup = "optional" would start it without'
                )
            return
        for key in asked:
            if CONTROLLERS[key] not in self.controllers:
                raise CgroupUnavailableError(
                    f"limits.{key} needs the controller {CONTROLLERS[key]}, which {self._root} does not have"
                    f'{f" ({self.why})" if self.why else ""}; cgroup = "optional" would start it without'
                )

    def make(self, name: str, mode: str, limits: Mapping[str, float]) -> Cgroup | None:
        """Make the group of an instance, with its limits; None if it is to have none, or may be without.

        Raises:
            CgroupUnavailableError: it cannot be had, and has to be.
        """
        self.require(mode, limits)
        path = self.path_of(name)
        if path is None or mode == "off":
            return None
        wanted = {CONTROLLERS[key] for key, value in limits.items() if value >= 0} & self.controllers
        had = {controller for controller in sorted(wanted) if self._enable(controller)}
        self.require(mode, limits)
        group = Cgroup(path)
        try:
            path.mkdir(exist_ok=True)
            group.limit({key: value for key, value in limits.items() if CONTROLLERS[key] in had})
        except OSError as error:
            message = f"{error.filename or path}: {error.strerror}"
            if mode != "optional":
                raise CgroupUnavailableError(f"its control group cannot be made: {message}") from None
            log.warning("%s: no control group: %s", name, message)
            return group if path.is_dir() else None
        return group

    def tidy_up(self, known: Collection[str]) -> None:
        """See to groups that an earlier supervisor has left behind, of instances that nobody knows of."""
        if self.base is None:
            return
        for path in _below(self.base):
            if path.name in known or path.name == SUPERVISOR:
                continue
            if not Cgroup(path).remove():
                pids = ", ".join(map(str, Cgroup(path).processes()))
                log.warning("%s holds processes of no instance that is known, left alone: %s", path, pids)

    def close(self) -> None:
        """Remove what is ours, unless somebody is still in it."""
        if self.base is None:
            return
        with contextlib.suppress(OSError):
            self.base.rmdir()

    def to_json(self) -> dict[str, Any]:
        return {
            "by": "process group" if self.base is None else "cgroup",
            "cgroup": None if self.base is None else str(self.base),
            "controllers": sorted(self.controllers),
            "why": self.why or None,
        }


class _UnusableError(Exception):
    """Why there are no control groups to be had."""


def is_cgroup2(folder: Path) -> bool:
    """Whether a folder, or what it would be in, is of the cgroup v2 file system."""
    real = Path(os.path.realpath(folder))
    while not real.exists() and real != real.parent:
        real = real.parent
    return (real / "cgroup.controllers").exists() and (real / "cgroup.procs").exists()


def _checked(folder: Path) -> Path:
    """A configured folder; it is made if it is not there: they are gone after each boot."""
    if not is_cgroup2(folder):
        raise _UnusableError(f"supervisor.cgroup_root ({folder}) is not in a cgroup v2 file system")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mounts() -> Iterator[_Mount]:
    """Where cgroup v2 is mounted; see proc(5) on mountinfo."""
    for line in _read(Path("/proc/self/mountinfo")).split("\n"):
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if after.startswith("cgroup2 ") and len(fields) > 4:
            point = fields[4].encode().decode("unicode_escape")  # a blank is \040
            yield _Mount(Path(point), fields[3])


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def _is_marked(folder: Path) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _below(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _read(file: Path) -> str:
    """A file of the kernel's; empty when it is not there (any more)."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _fields(file: Path) -> dict[str, int]:
    """A file of lines with a name and a number."""
    pairs = (line.split(" ") for line in _read(file).split("\n"))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _write(file: Path, text: str) -> None:
    """In one write(2), which is how the kernel takes it; nothing is made that is not there."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        error.filename = str(file)
        raise
    finally:
        os.close(fd)
