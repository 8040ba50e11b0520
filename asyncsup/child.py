"""Spawn, signal, wait for and reap one child and the process group it leads.

Only vfork paths are used (`os.posix_spawn`): they do not slow down with the size of the supervisor. What
posix_spawn cannot say (limits, umask, user, the pid itself) goes through ``sh`` and ``setpriv``, which exec
the program, so the pid is the program's. Every child leads a session of its own: its pid is its group's id.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import os
import re
import resource
import shlex
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec

from asyncsup.errors import SpawnError
from asyncsup.restart import Exit

# dash's names for the limits; `ulimit -u` of other shells is `-p` there.
_ULIMIT_FLAGS: Mapping[str, str] = {
    "as": "-v", "core": "-c", "cpu": "-t", "data": "-d", "fsize": "-f",
    "memlock": "-l", "nofile": "-n", "nproc": "-p", "stack": "-s",
}  # fmt: skip
_ULIMIT_UNITS: Mapping[str, int] = {
    "as": 1024, "core": 512, "data": 1024, "fsize": 512, "memlock": 1024, "stack": 1024,
}  # fmt: skip
"""Bytes per unit `ulimit` counts in; 1 where it counts things or seconds."""


# Whatever this process ignores (Python: SIGPIPE and SIGXFSZ; `nohup`: SIGHUP) a child would ignore as well.
_RESETTABLE_SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})

FIRST_FREE_DESCRIPTOR: Final = 256
"""Above every number that a program may ask for."""

LOOK_AGAIN_SECONDS: Final = 0.1
"""How long after a look at a process group for which there was no descriptor the next one comes."""

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_PROC_BYTES: Final = 64 << 10
_SOFT_NOFILE, _HARD_NOFILE = resource.getrlimit(resource.RLIMIT_NOFILE)


class SpawnSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a spawn needs. Descriptors stay the caller's."""

    command: Sequence[str]
    directory: Path
    env: Mapping[str, str]
    stdout: int
    stderr: int
    descriptors: Mapping[int, int] = msgspec.field(default_factory=dict)
    """Further ones: number in the program to number here."""
    umask: int | None = None
    user: str | None = None
    group: str | None = None
    pid_variables: Sequence[str] = ()
    """Variables of its environment that are to hold its pid."""
    limits: Mapping[str, int] = msgspec.field(default_factory=dict)
    """rlimit name to value in the units of setrlimit(2); -1 is unlimited."""
    cgroup: Path | None = None
    """The folder of the control group it is to be in from its first instruction on."""


def resolve_program(program: str, directory: Path, search_path: str | None) -> str:
    """Find the file to execute, in the target's own PATH, as a shell would.

    Raises:
        SpawnError: nothing there, a folder, or not executable; the message says which.
    """
    if "/" in program:
        path = program if program.startswith("/") else str(directory / program)
        try:
            status = os.stat(path)  # noqa: PTH116 - pathlib takes longer than the kernel
        except OSError as error:
            why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise SpawnError(f"{program}: {why} (looked in {directory})") from None
        if stat.S_ISDIR(status.st_mode):
            raise SpawnError(f"{program} is a folder, not a program")
        if not os.access(path, os.X_OK):
            raise SpawnError(f"{program} is not executable; `chmod +x {shlex.quote(path)}` would do")
        return path
    found = shutil.which(program, path=search_path or os.defpath)
    if found is None:
        raise SpawnError(f"{program}: command not found in PATH={search_path or os.defpath}")
    return str(directory / found)


def _through_shim(program: str, spec: SpawnSpec) -> list[str]:
    """The argument vector, with `sh` and `setpriv` in front where one of the settings needs them."""
    argv = [program, *spec.command[1:]]
    if spec.user is not None or spec.group is not None:
        argv = [
            resolve_program("setpriv", Path("/"), os.defpath),
            *_identity(spec.user, spec.group),
            "--",
            *argv,
        ]
    # First the group, as long as it is us who are asked whether that is allowed, and it has no children yet.
    settings = [] if spec.cgroup is None else [f"echo 0 > {shlex.quote(f'{spec.cgroup}/cgroup.procs')}"]
    settings += [f"export {name}=$$" for name in spec.pid_variables]
    if spec.umask is not None:
        settings.append(f"umask {spec.umask:03o}")
    for name, value in spec.limits.items():
        amount = "unlimited" if value < 0 else str(value // _ULIMIT_UNITS.get(name, 1))
        # The shell's own words name neither the limit nor the value.
        says = f"asyncsup: limits.{name} cannot be set to {'unlimited' if value < 0 else value}"
        settings.append(f"{{ ulimit {_ULIMIT_FLAGS[name]} {amount} || {{ echo '{says}' >&2; exit 1; }}; }}")
    if settings:
        argv = ["/bin/sh", "-c", " && ".join([*settings, 'exec "$@"']), "sh", *argv]
    return argv


def _identity(user: str | None, group: str | None) -> list[str]:
    """What tells `setpriv`, which keeps the pid unlike `su`, whom to become.

    Raises:
        SpawnError: there is no such user or group (any more): `setpriv` would say so in the program's place.
    """
    import grp  # noqa: PLC0415 - only where a user or group is configured
    import pwd  # noqa: PLC0415 - as above

    try:
        gid = None
        if group is not None:
            gid = (grp.getgrgid(int(group)) if group.isdigit() else grp.getgrnam(group)).gr_gid
        if user is None:
            return [f"--regid={gid}", "--clear-groups"]
        record = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        missing = f"group {group}" if group is not None and gid is None else f"user {user}"
        raise SpawnError(f"cannot be started: there is no {missing} any more") from None
    # Supplementary groups are a matter of the user: by the uid `setpriv` looks them up.
    return [f"--reuid={record.pw_uid}", f"--regid={record.pw_gid if gid is None else gid}", "--init-groups"]


def spawn(spec: SpawnSpec) -> Child:
    """Start a process.

    Raises:
        SpawnError: the program, its folder or its user is not usable; nothing was started.
    """
    program = resolve_program(spec.command[0], spec.directory, spec.env.get("PATH"))
    argv = _through_shim(program, spec)
    try:
        before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SpawnError(f"{spec.command[0]}: cannot be started: {error.strerror}") from None
    earliest = ticks_now()
    try:
        # posix_spawn has no working directory. The event loop's thread is the only one that uses relative
        # paths, and this block does not yield, so nobody sees the excursion.
        os.chdir(spec.directory)
        try:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            try:
                pid = _spawn_with_usual_limits(
                    argv[0],
                    argv,
                    spec.env,
                    setsid=True,
                    setsigdef=_RESETTABLE_SIGNALS,
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, null, 0),
                        (os.POSIX_SPAWN_DUP2, spec.stdout, 1),
                        (os.POSIX_SPAWN_DUP2, spec.stderr, 2),
                        *((os.POSIX_SPAWN_DUP2, fd, number) for number, fd in spec.descriptors.items()),
                    ],
                )
            finally:
                os.close(null)
        finally:
            os.fchdir(before)
    except ValueError as error:
        raise SpawnError(f"{spec.command[0]}: cannot be started: {error}") from None
    except OSError as error:
        if error.filename == str(spec.directory):
            why = f"cannot be started in {spec.directory}: {error.strerror}"
        elif error.errno == errno.ENOENT and (interpreter := _interpreter(program, spec.directory)):
            why = f"cannot be started: its first line names {interpreter!r}, which is not there"
        elif error.errno == errno.EBADF and (number := max(spec.descriptors, default=0)) >= _SOFT_NOFILE:
            why = f"cannot be started: descriptor {number} is beyond the soft limit of {_SOFT_NOFILE}"
        else:
            why = f"cannot be started: {error.strerror}"
        raise SpawnError(f"{spec.command[0]}: {why}") from None
    finally:
        os.close(before)
    # In most cases the clock leaves no choice, and nobody has to be asked.
    start_ticks = earliest if earliest == ticks_now() else None
    try:
        return Child(pid, start_ticks=start_ticks)
    except OSError as error:
        # Nobody would see it end.
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise SpawnError(f"{spec.command[0]}: cannot be started: {error.strerror}") from None


def _interpreter(program: str, directory: Path) -> str | None:
    """What the first line of a script names after ``#!``; None where there is no such line."""
    try:
        with (directory / program).open("rb") as file:
            first = file.readline(256)
    except OSError:
        return None
    # Only blanks end it for the kernel: a carriage return is part of the name, and often what is wrong.
    words = re.split(rb"[ \t]+", first.removeprefix(b"#!").rstrip(b"\n").lstrip(b" \t"), maxsplit=1)
    return os.fsdecode(words[0]) or None if first.startswith(b"#!") else None


def out_of_the_way(fd: int) -> int:
    """Move a descriptor to where no number lies that a program asks for; the old one is closed.

    A spawn puts descriptors under their numbers one after the other: none may be overwritten before its turn.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_DESCRIPTOR)
    except OSError as error:
        # EINVAL: the limit is below the number asked for.
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
    finally:
        os.close(fd)


def seal_descriptors() -> None:
    """Keep what this process itself was started with, beyond the standard streams, away from its children."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers are wanted, not paths
        if int(name) > 2:
            # The listing's own descriptor is among them, and closed by now.
            with contextlib.suppress(OSError):
                os.set_inheritable(int(name), False)


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: each instance costs up to five."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (_HARD_NOFILE, _HARD_NOFILE))


def usual_descriptor_limit() -> None:
    """Go back to the soft limit this process was started with, for what is executed from it: a program that
    uses select(2) is not to inherit ours. Descriptors that are open stay open.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (_SOFT_NOFILE, _HARD_NOFILE))


def _no_signals_at_the_usual_limit() -> Iterator[int]:
    """The signal mask of a child: empty. By the way, the soft limit of descriptors is what it is to inherit.

    Limits are inherited at the fork; but glibc refuses file actions (EBADF) whose descriptor is not below the
    soft limit of the moment at which they are added. `os.posix_spawn` adds them, then asks for the mask, and
    then forks: this is where to lower ours.
    """
    usual_descriptor_limit()
    yield from ()


def _spawn_with_usual_limits(path: str, argv: list[str], env: Mapping[str, str], **settings: Any) -> int:
    """posix_spawn with the soft descriptor limit this process was started with, and no signal blocked."""
    try:
        return os.posix_spawn(path, argv, env, setsigmask=_no_signals_at_the_usual_limit(), **settings)
    finally:
        raise_descriptor_limit()


class Child:
    """A child that has not been reaped yet, and its process group.

    Args:
        groups: its process groups; by default the one that it leads.
        start_ticks: when the kernel started it, if that is known.

    Attributes:
        started: monotonic time of the spawn.
    """

    expected: ClassVar[set[int]] = set()
    """The pids of those whose exit somebody waits for: whoever reaps strays leaves them alone."""

    def __init__(
        self,
        pid: int,
        *,
        pidfd: int | None = None,
        started: float | None = None,
        groups: Sequence[int] = (),
        start_ticks: int | None = None,
    ) -> None:
        self.pid = pid
        self.groups = list(groups) or [pid]
        self.started = time.monotonic() if started is None else started
        self._start_ticks = start_ticks
        self._pidfd = os.pidfd_open(pid) if pidfd is None else pidfd
        if self._pidfd >= 0:
            self.expected.add(pid)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def identity(self) -> tuple[int, int]:
        """What no other process has: when the kernel started it (clock ticks since the boot), and the inode
        of its pidfd (0 on kernels before 6.9, which give all of them the same)."""
        if self._start_ticks is None:
            facts = read_facts(self.pid)
            self._start_ticks = facts.start_ticks if facts is not None else 0
        return self._start_ticks, pidfd_inode(self._pidfd)

    def on_exit(
        self, callback: Callable[[Exit], None], *, before_reaping: Callable[[Exit], None] = lambda _: None
    ) -> None:
        """Call back once, from the event loop, when the process has ended and was reaped.

        Args:
            before_reaping: as long as it has not returned, whoever takes over from this process can still
                learn how the child has ended.
        """
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._readable, callback, before_reaping)

    def _readable(self, callback: Callable[[Exit], None], before_reaping: Callable[[Exit], None]) -> None:
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            self._reaped_elsewhere(callback, before_reaping)
            return
        if info is None:
            return
        exited = info.si_code == os.CLD_EXITED
        ended = Exit(status=info.si_status) if exited else Exit(signal=info.si_status)
        try:
            before_reaping(ended)
        finally:
            # Whatever went wrong: a reader that stays is called over and over.
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            self._let_go()
            callback(ended)

    def _reaped_elsewhere(
        self, callback: Callable[[Exit], None], before_reaping: Callable[[Exit], None]
    ) -> None:
        """It has ended, and is not there for us to ask how."""
        try:
            before_reaping(Exit())
        finally:
            self._let_go()
            callback(Exit())

    def _let_go(self) -> None:
        assert self._loop is not None
        # The reader goes before the descriptor: a closed one could be reused under the selector's eyes.
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.expected.discard(self.pid)

    def kill_and_reap(self) -> None:
        """End it here and now, the process alone, and call nobody back."""
        if self.signal(signal.SIGKILL):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            self._let_go()

    @property
    def alive(self) -> bool:
        return self._pidfd >= 0

    def signal(self, number: int) -> bool:
        """Send a signal to the process alone; False when it is gone already."""
        if self._pidfd < 0:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def signal_group(self, number: int) -> bool:
        """Send a signal to every process of its groups; False when they are empty."""
        reached = [signal_group(group, number) for group in self.groups]
        return any(reached)


def signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of a group; False when it is empty."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        # Every member changed its user id: the kernel refuses only when none could be signalled.
        return True
    return True


class ProcessFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel says of a process; ``wait_status`` is None while it has not ended, or for strangers."""

    state: str
    parent: int
    group: int
    session: int
    start_ticks: int
    wait_status: int | None

    @property
    def has_ended(self) -> bool:
        """It waits for being reaped."""
        return self.state in {"Z", "X"}


def read_proc(pid: int, name: str) -> bytes:
    """Read a file of /proc/PID. (pathlib takes longer than the kernel.)"""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = os.read(fd, _PROC_BYTES)
        while len(content) % _PROC_BYTES == 0 and (more := os.read(fd, _PROC_BYTES)):
            content += more
    finally:
        os.close(fd)
    return content


def read_facts(pid: int) -> ProcessFacts | None:
    """Read /proc/PID/stat, see proc(5); None when there is no such process."""
    try:
        line = read_proc(pid, "stat")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command is in parentheses, and may hold blanks and parentheses itself.
    values = line[line.rindex(b")") + 2 :].split()
    ended = values[0] in {b"Z", b"X"}
    return ProcessFacts(
        state=values[0].decode(),
        parent=int(values[1]),
        group=int(values[2]),
        session=int(values[3]),
        start_ticks=int(values[19]),
        wait_status=int(values[49]) if ended else None,
    )


def ticks_now() -> int:
    """Now, as the kernel writes down when a process was started: clock ticks since the boot."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // (10**9 // _CLOCK_TICKS)


def pidfd_inode(pidfd: int) -> int:
    """The inode of a pidfd: one per process since kernel 6.9, before that one for all; then 0."""
    status = os.fstat(pidfd)
    return 0 if (status.st_dev, status.st_ino) == _anonymous_inode() else status.st_ino


@functools.cache
def _anonymous_inode() -> tuple[int, int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    status = os.fstat(fd)
    os.close(fd)
    return status.st_dev, status.st_ino


def user_ids(pid: int) -> frozenset[int]:
    """Whom a process may act as: its real, effective and saved user id; empty when there is no process."""
    try:
        status = read_proc(pid, "status")
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    line = next((line for line in status.split(b"\n") if line.startswith(b"Uid:")), b"Uid:")
    return frozenset(map(int, line.split()[1:4]))


def group_members(*groups: int) -> list[int]:
    """The processes of groups that have not ended (zombies do not count)."""
    members = []
    with os.scandir("/proc") as entries:
        for entry in entries:
            if not entry.name.isdigit():
                continue
            facts = read_facts(int(entry.name))
            if facts is not None and facts.group in groups and not facts.has_ended:
                members.append(int(entry.name))
    return members


def when_groups_empty(groups: Sequence[int], callback: Callable[[], None]) -> None:
    """Call back once no process of the groups is left; at once when that is so already.

    The members are watched by pidfd: nothing polls, unless there is no descriptor to be had. Whoever forks
    meanwhile is found by looking again when the last known member has ended.
    """
    loop = asyncio.get_running_loop()
    watched: dict[int, int] = {}

    def look() -> None:
        try:
            for pid in group_members(*groups):
                try:
                    watched[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
                loop.add_reader(watched[pid], ended, pid)
        except OSError:  # out of descriptors; nobody else would look again
            if not watched:
                loop.call_later(LOOK_AGAIN_SECONDS, look)
            return
        if not watched:
            callback()

    def ended(pid: int) -> None:
        fd = watched.pop(pid)
        loop.remove_reader(fd)
        os.close(fd)
        if not watched:
            look()

    if any(signal_group(group, 0) for group in groups):
        look()
    else:
        callback()
