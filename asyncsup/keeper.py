"""The keeper: the parent of the supervisor. It holds what must not die with it, and starts it again.

This is the process that `asyncsup serve` becomes. It runs as a script (``python -I -S keeper.py``), imports
nothing of asyncsup, has no event loop, no threads and no socket but one: small enough not to fail.

It holds descriptors for the supervisor (the FIFOs of the instances' output, the lock, sockets) under names of
the supervisor's choice, and hands them to the next one. As a subreaper it becomes the parent of every process
that a dead supervisor leaves behind, reaps it, and keeps how it ended until the supervisor has seen that.
Signals that end `serve`, or are otherwise meant for the supervisor, are passed on; so is its exit status.

They talk over a socket pair, one message after the other, words separated by blanks:

    supervisor to keeper                        keeper to supervisor
    hold NAME        with a descriptor          keeper PID
    drop NAME                                   held NAME           with a descriptor
    ready            serving                    exit PID START STATUS
    seen PID START   an exit, acted upon        done                that was all there is to hand over
    end STATUS       end, and you as well       signal NUMBER
    replace ...      I end, start this instead

If the keeper is killed the supervisor ends with it (PR_SET_PDEATHSIG); the instances live on, and the next
`asyncsup serve` takes them back.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import deque

STEADY_SECONDS = 1.0
"""A supervisor that has served for this long did not crash because it was started."""
MOST_FAILURES = 10
"""So many starts in a row that did not come to serving at all, and it is given up."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 30.0
MOST_EXITS = 65_536
CONFIG_INVALID = 5
"""The exit status of a supervisor that cannot use its configuration: somebody is at work on it."""

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
PASSED_ON = (*ENDING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
IGNORED = (signal.SIGPIPE, signal.SIGALRM)
"""Nothing that is sent here by mistake may end the keeper."""


class Keeper:
    """Everything the keeper knows. Made by `read_state`, and written by `write_state` to become another."""

    def __init__(self) -> None:
        self.command: list[str] = []
        self.command_before: list[str] = []
        """What to go back to, when the command that replaced it does not come up."""
        self.held: dict[str, int] = {}
        self.exits: dict[tuple[int, int], int] = {}
        """Wait statuses of reaped processes the supervisor has not seen to yet, by pid and start time."""
        self.soft_limit = -1
        """Of descriptors, as the supervisor is to find it."""
        self.supervisor = 0
        """Its pid; 0 when there is none."""
        self.channel: socket.socket | None = None
        self.outgoing: deque[tuple[bytes, int | None]] = deque()
        self.ready = False
        self.ready_since = 0.0
        self.was_ever_ready = False
        self.end_status: int | None = None
        """What the supervisor wants everything to end with."""
        self.replacement: list[str] = []
        self.crashes = 0
        """In a row, none of them steady before."""
        self.failures = 0
        """Starts in a row that did not come to serving."""
        self.start_at: float | None = None
        self.ending_signal = 0
        """The last signal that asked for the end."""
        self.signals: deque[int] = deque()

    # --- the loop -------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Keep until everything ends; returns the exit status, negative for a signal to die of."""
        wake_reader, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(number, lambda number, _: self.signals.append(number))
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if self.channel is None:
            self.start_at = 0.0
        else:
            self.greet()
        while True:
            if self.start_at is not None and time.monotonic() >= self.start_at:
                self.start_at = None
                if not self.start() and (status := self.crashed()) is not None:
                    return status
            self.wait(wake_reader)
            # What the supervisor has said first: a signal may come from who has seen it serve.
            self.receive()
            while self.signals:
                self.pass_on(self.signals.popleft())
            self.send()
            ended = self.reap()
            if ended is not None and (status := self.supervisor_ended(ended)) is not None:
                return status

    def wait(self, wake: int) -> None:
        """Until there is something to do: nothing here looks at the clock while nothing happens."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        if self.channel is not None:
            poll.register(self.channel, select.POLLIN | (select.POLLOUT if self.outgoing else 0))
        pause = None if self.start_at is None else max(0.0, self.start_at - time.monotonic()) * 1000
        poll.poll(pause)
        with contextlib.suppress(BlockingIOError):
            os.read(wake, 4096)

    def pass_on(self, number: int) -> None:
        if number in ENDING:
            self.ending_signal = number
        if number in (*ENDING, signal.SIGHUP) and self.start_at is not None:
            self.start_at = 0.0  # only a supervisor can do what is wanted
        if number == signal.SIGCHLD or not self.supervisor:
            return
        if self.ready:
            self.tell(f"signal {number}")
        elif number in ENDING and not self.was_ever_ready:
            os.kill(self.supervisor, number)  # it cannot read yet, and has started nothing

    # --- the supervisor -------------------------------------------------------------------------------------

    def start(self) -> bool:
        """Start a supervisor; False, and said, when its program cannot even be executed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.set_inheritable(True)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.ready, self.end_status = False, None
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (self.soft_limit, hard))
            self.supervisor = os.posix_spawn(
                self.command[0],
                [*self.command, "--keeper", str(theirs.fileno())],
                os.environ,
                setsigmask=(),
                setsigdef=(*PASSED_ON, *IGNORED, signal.SIGCHLD, signal.SIGXFSZ),
            )
        except OSError as error:
            say(f"{self.command[0]} cannot be started: {error.strerror}")
            ours.close()
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            theirs.close()
        self.channel = ours
        self.greet()
        return True

    def greet(self) -> None:
        """Hand over what an earlier supervisor has left."""
        self.outgoing.clear()
        self.tell(f"keeper {os.getpid()}")
        for name, fd in self.held.items():
            self.tell(f"held {name}", fd)
        for (pid, start), status in self.exits.items():
            self.tell(f"exit {pid} {start} {status}")
        self.tell("done")

    def tell(self, message: str, fd: int | None = None) -> None:
        self.outgoing.append((message.encode(), fd))

    def send(self) -> None:
        while self.outgoing and self.channel is not None:
            message, fd = self.outgoing[0]
            try:
                socket.send_fds(self.channel, [message], [] if fd is None else [fd])
            except BlockingIOError:
                return
            except OSError:
                self.outgoing.clear()  # it is gone
                return
            self.outgoing.popleft()

    def receive(self) -> None:
        while self.channel is not None:
            try:
                data, fds, _, _ = socket.recv_fds(self.channel, 65536, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self.channel.close()
                self.channel = None
                return
            for fd in fds:
                os.set_inheritable(fd, False)  # or each supervisor to come would have it twice
            word, _, rest = data.decode("utf-8", "surrogateescape").partition(" ")
            self.understand(word, rest, fds)

    def understand(self, word: str, rest: str, fds: list[int]) -> None:
        if word == "hold" and fds:
            self.drop(rest)
            self.held[rest] = fds.pop()
        elif word == "drop":
            self.drop(rest)
        elif word == "ready":
            self.ready = self.was_ever_ready = True
            self.ready_since = time.monotonic()
            self.command_before = []
            if self.ending_signal:
                self.tell(f"signal {self.ending_signal}")
        elif word == "seen":
            pid, start = map(int, rest.split())
            self.exits.pop((pid, start), None)
        elif word == "end":
            self.end_status = int(rest)
        elif word == "replace":
            self.replacement = rest.split("\0")
        for fd in fds:
            os.close(fd)

    def drop(self, name: str) -> None:
        if name in self.held:
            os.close(self.held.pop(name))

    # --- ends -----------------------------------------------------------------------------------------------

    def reap(self) -> int | None:
        """Reap what has ended; returns the wait status of the supervisor, if it is among it."""
        ended = None
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return ended
            if info is None:
                return ended
            start = start_time(info.si_pid)  # while it can be read
            _, status = os.waitpid(info.si_pid, 0)
            if info.si_pid == self.supervisor:
                ended = status
            else:
                self.exits[info.si_pid, start] = status
                if len(self.exits) > MOST_EXITS:
                    del self.exits[next(iter(self.exits))]
                self.tell(f"exit {info.si_pid} {start} {status}")

    def supervisor_ended(self, status: int) -> int | None:
        """Decide what follows; returns what the keeper ends with, None to go on."""
        self.receive()  # its last words
        if self.channel is not None:
            self.channel.close()
        pid, self.supervisor, self.channel = self.supervisor, 0, None
        self.outgoing.clear()
        if self.replacement:
            self.replace()
            return None
        if self.end_status is not None and (self.ready or not self.was_ever_ready):
            return self.end_status
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {number}" if number else f"ended with status {code}"
        if not self.was_ever_ready:
            if not self.ending_signal:
                say(f"the supervisor (pid {pid}) {how} before it was ready")
            return code
        say(f"the supervisor (pid {pid}) {how}")
        return self.crashed()

    def crashed(self) -> int | None:
        """Start it again: at once the first time, then after a pause that doubles."""
        now = time.monotonic()
        if not self.ready and self.command_before:
            say("the new program did not come up; going back to the one before")
            self.command, self.command_before = self.command_before, []
            self.start_at = now
            return None
        if self.end_status == CONFIG_INVALID and self.ending_signal:
            say("the targets run on, because without a configuration they cannot be stopped")
            return CONFIG_INVALID
        if self.end_status == CONFIG_INVALID:
            self.start_at = now + LONGEST_PAUSE_SECONDS
            say(f"the targets run on; trying again in {LONGEST_PAUSE_SECONDS:g} s, or at once on SIGHUP")
            return None
        steady = self.ready and now - self.ready_since >= STEADY_SECONDS
        self.crashes = 1 if steady else self.crashes + 1
        self.failures = 0 if self.ready else self.failures + 1
        if self.failures >= MOST_FAILURES:
            say(
                f"giving up after {self.failures} starts in a row that failed; the targets run on, and the "
                "next `asyncsup serve` takes them back"
            )
            return 1
        pause = FIRST_PAUSE_SECONDS * 2 ** (self.crashes - 2) if self.crashes > 1 else 0.0
        pause = min(pause, LONGEST_PAUSE_SECONDS)
        self.start_at = now + pause
        say(f"the targets run on; starting it again{f' in {pause:g} s' if pause else ''}")
        return None

    def replace(self) -> None:
        """The supervisor has ended to be started from another program: so is the keeper."""
        python, script, *command = self.replacement
        self.command_before, self.command, self.replacement = self.command, command, []
        self.start_at = time.monotonic()
        become(python, script, self)


# --- becoming a keeper --------------------------------------------------------------------------------------


def become(python: str, script: str, keeper: Keeper) -> None:
    """Execute a keeper in this process, with everything this one has. Returns only when that fails."""
    state = os.memfd_create("keeper", 0)
    os.write(state, write_state(keeper))
    # Until the other one has its handlers, a signal would end it.
    signal.pthread_sigmask(signal.SIG_SETMASK, (*PASSED_ON, *IGNORED))
    for number in keeper.signals:
        os.kill(os.getpid(), number)  # not dealt with: it is for the other one
    for fd in keeper.held.values():
        os.set_inheritable(fd, True)
    try:
        os.execv(python, [python, "-I", "-S", script, str(state)])
    except OSError as error:
        say(f"{python} cannot be executed ({error.strerror}); staying the keeper I am")
    for fd in keeper.held.values():
        os.set_inheritable(fd, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.close(state)


def write_state(keeper: Keeper) -> bytes:
    channel = "-1" if keeper.channel is None else str(keeper.channel.fileno())
    lines = [
        ["soft_limit", str(keeper.soft_limit)],
        ["supervisor", str(keeper.supervisor), channel],
        ["was_ever_ready", str(int(keeper.was_ever_ready))],
        ["crashes", str(keeper.crashes)],
        ["ending_signal", str(keeper.ending_signal)],
        ["command", *keeper.command],
        ["command_before", *keeper.command_before],
        *(["held", str(fd), name] for name, fd in keeper.held.items()),
        *(["exit", str(pid), str(start), str(status)] for (pid, start), status in keeper.exits.items()),
    ]
    # In hex, because a command may hold anything.
    return "\n".join(" ".join(os.fsencode(word).hex() for word in line) for line in lines).encode()


def read_state(fd: int) -> Keeper:
    size = os.fstat(fd).st_size
    keeper = Keeper()
    for line in os.pread(fd, size, 0).decode().split("\n"):
        word, *values = (os.fsdecode(bytes.fromhex(each)) for each in line.split(" "))
        if word == "soft_limit":
            keeper.soft_limit = int(values[0])
        elif word == "supervisor":
            keeper.supervisor = int(values[0])
            if keeper.supervisor:
                keeper.channel = socket.socket(fileno=int(values[1]))
                keeper.channel.setblocking(False)
                keeper.channel.set_inheritable(False)
        elif word == "was_ever_ready":
            keeper.was_ever_ready = values[0] == "1"
        elif word == "crashes":
            keeper.crashes = int(values[0])
        elif word == "ending_signal":
            keeper.ending_signal = int(values[0])
        elif word == "command":
            keeper.command = values
        elif word == "command_before":
            keeper.command_before = values
        elif word == "held":
            os.set_inheritable(int(values[0]), False)
            keeper.held[values[1]] = int(values[0])
        elif word == "exit":
            pid, start, status = map(int, values)
            keeper.exits[pid, start] = status
    os.close(fd)
    return keeper


def start_time(pid: int) -> int:
    """When the kernel started a process, in clock ticks since the boot; see proc(5)."""
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    stat = os.read(fd, 4096)
    os.close(fd)
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def say(text: str) -> None:
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d}"
    with contextlib.suppress(OSError):
        os.write(2, f"{stamp} WARNING keeper: {text}\n".encode())


def main() -> None:
    if len(sys.argv) == 1:
        return  # it was only to be seen whether it starts
    status = read_state(int(sys.argv[1])).run()
    if status < 0:
        # Whoever waits for `serve` is to see what happened to it.
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        status = 128 - status  # PID 1 does not die of what it sends itself
    sys.exit(status)


if __name__ == "__main__":
    main()
