"""`asyncsup serve` as PID 1 of a container: it reaps, hears signals, ends with the right status."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Serve, children_of, wait_for

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="only root can be PID 1 of a new PID namespace, and `unshare` (util-linux) makes one",
)

QUICK = '[defaults]\nmin_uptime = "50ms"\nrestart_delay = "10ms"\n\n'
SLEEPER = 'command = ["sleep", "3600"]\n'
ORPHANS = """\
for i in 1 2 3 4 5; do setsid sh -c 'sleep 0.05 & exit 0'; done
exec sleep 3600
"""
"""Each shell ends before its child, which has a session of its own."""


class FirstProcess(Serve):
    """Runs `serve` as PID 1 of a PID namespace; ``process`` is the `unshare` around it."""

    def command(self, *arguments: str) -> list[str]:
        unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return [*unshare, *super().command(*arguments)]

    @property
    def first(self) -> int:
        """What PID 1 is called outside."""
        assert self.process is not None
        return int(wait_for(lambda: children_of(self.process.pid), "a first process")[0])  # type: ignore[union-attr]

    @property
    def supervisor(self) -> int:
        if self.alone:
            return self.first
        return next((pid for pid in children_of(self.first) if _is_serve(pid)), 0)

    def tell(self, number: signal.Signals) -> None:
        os.kill(self.first, number)

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(60)


def _is_serve(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it may be gone by now
        return b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


@pytest.fixture(params=["with a keeper", "without a keeper"])
def serve(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[FirstProcess]:
    server = FirstProcess(short_tmp)
    server.alone = request.param == "without a keeper"
    yield server
    if server.process is not None and server.process.poll() is None:
        for pid in children_of(server.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        try:
            server.process.wait(60)
        finally:
            server.process.kill()
            server.process.wait()
    assert "Traceback" not in server.errors(), server.errors()


def test_it_is_the_first_process(serve: FirstProcess) -> None:
    client = serve.start(f"{QUICK}[target.a]\n{SLEEPER}")
    info = client.call("supervisor.info")
    assert (info["keeper"] or info["pid"]) == 1
    client.close()


def test_no_zombie_is_left_of_orphans(serve: FirstProcess) -> None:
    script = serve.folder / "orphans.sh"
    script.write_text(ORPHANS)
    client = serve.start(f'{QUICK}[target.a]\ncommand = ["sh", "{script}"]\ninstances = 3\n')
    wait_for(lambda: client.call("status")["targets"][0]["ready"], "the target to be ready")
    family = {serve.first, serve.supervisor}
    instances = {int(i["pid"]) for i in client.call("status")["targets"][0]["instances"]}

    def only_what_runs() -> bool:
        children = {child for pid in family for child in children_of(pid)} - family
        # Their pids are those of the namespace, so they are counted.
        return len(children) == len(instances)

    wait_for(only_what_runs, "all orphans to be reaped")
    client.close()


def test_term_stops_everything_in_order(serve: FirstProcess) -> None:
    program = 'trap "echo told; exit 0" TERM; echo up; while :; do sleep 0.05; done'
    client = serve.start(
        f"{QUICK}[target.a]\ncommand = ['sh', '-c', '{program}']\nready.log = 'up'\nstop_timeout = '1h'\n"
    )
    wait_for(lambda: client.call("status")["targets"][0]["ready"], "the target to be ready")
    client.close()
    serve.tell(signal.SIGTERM)
    assert serve.ended() == 0
    assert "told\n" in (serve.folder / ".asyncsup/logs/a.0.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_int_and_quit_end_it_as_well(serve: FirstProcess, number: signal.Signals) -> None:
    serve.start(f"{QUICK}[target.a]\n{SLEEPER}").close()
    serve.tell(number)
    assert serve.ended() == 0


def test_term_before_it_is_ready_is_not_lost(serve: FirstProcess) -> None:
    """The kernel drops what PID 1 has no handler for."""
    serve.write(f"{QUICK}[target.a]\n{SLEEPER}")
    with serve.stderr.open("ab") as stderr:
        serve.process = subprocess.Popen(serve.command(), stdout=stderr, stderr=stderr)
    lock = serve.folder / ".asyncsup/run/lock"
    wait_for(lock.exists, "it to begin", every=0.001)
    serve.tell(signal.SIGTERM)
    assert serve.ended() in {0, 128 + signal.SIGTERM}


def test_hup_takes_up_another_configuration(serve: FirstProcess) -> None:
    client = serve.start(f"{QUICK}[target.a]\n{SLEEPER}")
    serve.write(f"{QUICK}[target.a]\n{SLEEPER}[target.b]\n{SLEEPER}")
    serve.tell(signal.SIGHUP)
    wait_for(lambda: len(client.call("status")["targets"]) == 2, "the other target")
    client.close()


def test_signals_without_a_meaning_end_nothing(serve: FirstProcess) -> None:
    client = serve.start(f"{QUICK}[target.a]\n{SLEEPER}")
    for number in (signal.SIGUSR1, signal.SIGPIPE, signal.SIGALRM):
        serve.tell(number)
    assert client.call("supervisor.info")["stopping"] is False
    client.close()


def test_the_end_of_what_is_essential_ends_it_with_its_exit_code(serve: FirstProcess) -> None:
    program = 'command = ["sh", "-c", "while [ ! -e go ]; do sleep 0.02; done; exit 7"]\n'
    essential = f'restart = "never"\nessential = true\n{program}'
    serve.start(f"{QUICK}[target.a]\n{SLEEPER}[target.b]\n{essential}").close()
    (serve.folder / "go").touch()
    assert serve.ended() == 7


def test_a_configuration_that_is_wrong_ends_it_with_five(serve: FirstProcess) -> None:
    serve.write("[target.a]\n")
    with serve.stderr.open("ab") as stderr:
        serve.process = subprocess.Popen(serve.command(), stdout=stderr, stderr=stderr)
    assert serve.ended() == 5


def test_a_supervisor_that_is_killed_is_there_again(serve: FirstProcess) -> None:
    if serve.alone:
        pytest.skip("without a keeper nobody starts it again: PID 1 is the supervisor")
    client = serve.start(f"{QUICK}[target.a]\n{SLEEPER}")
    before = client.call("status")["targets"][0]["instances"][0]["pid"]
    serve.kill_supervisor()
    client.close()
    client = serve.connect()
    assert client.call("status")["targets"][0]["instances"][0]["pid"] == before
    client.close()


def test_a_thousand_that_end_at_once_are_reaped_without_a_word() -> None:
    program = """
import asyncio, os, signal
from asyncsup.strays import StrayReaper

async def main():
    reaper = StrayReaper()
    reaper.start()
    if not (child := os.fork()):
        signal.pause()
    os.kill(child, signal.SIGKILL)
    for _ in range(1000):
        os.kill(os.getpid(), signal.SIGCHLD)
    while os.path.exists(f"/proc/{child}"):
        await asyncio.sleep(0.01)
    reaper.close()
    print("reaped")

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("reaped\n", "")
