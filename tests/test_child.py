"""Spawning, signalling and reaping real processes."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import children_of

from asyncsup.child import (
    Child,
    SpawnSpec,
    group_members,
    out_of_the_way,
    seal_descriptors,
    spawn,
    when_groups_empty,
)
from asyncsup.errors import SpawnError
from asyncsup.restart import Exit

pytestmark = pytest.mark.anyio


class Output:
    """A file the child writes to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    @property
    def text(self) -> str:
        return self.path.read_text()


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    out = Output(tmp_path / "out")
    yield out
    os.close(out.fd)


def spec(output: Output, *command: str, **settings: Any) -> SpawnSpec:
    settings.setdefault("directory", output.path.parent)
    settings.setdefault("env", dict(os.environ))
    return SpawnSpec(command=command, stdout=output.fd, stderr=output.fd, **settings)


async def ended(child: Child) -> Exit:
    future: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
    child.on_exit(future.set_result)
    return await asyncio.wait_for(future, 60)


async def test_exit_status_and_signal_are_told_apart(output: Output) -> None:
    assert await ended(spawn(spec(output, "sh", "-c", "exit 7"))) == Exit(status=7)
    child = spawn(spec(output, "sleep", "60"))
    assert child.signal(signal.SIGKILL)
    assert await ended(child) == Exit(signal=signal.SIGKILL)
    assert not child.signal(signal.SIGTERM)


async def test_the_child_has_the_folder_environment_and_output_it_was_given(output: Output) -> None:
    folder = output.path.parent / "sub folder"
    folder.mkdir()
    await ended(
        spawn(
            spec(output, "sh", "-c", 'pwd; echo "$A"', directory=folder, env={"A": "b c", "PATH": os.defpath})
        )
    )
    assert output.text == f"{folder}\nb c\n"


async def test_the_supervisors_folder_is_the_same_after_a_spawn(output: Output) -> None:
    before = Path.cwd()
    await ended(spawn(spec(output, "true", directory=Path("/"))))
    assert Path.cwd() == before


async def test_no_descriptor_leaks_into_the_child(output: Output) -> None:
    program = "import os; print(sorted(os.listdir('/proc/self/fd'), key=int))"
    stray = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(stray, True)
    seal_descriptors()
    try:
        await ended(spawn(spec(output, sys.executable, "-c", program)))
    finally:
        os.close(stray)
    # 3 is the listing's own.
    assert output.text == "['0', '1', '2', '3']\n"


async def test_ignored_signals_and_raised_limits_are_not_inherited(output: Output) -> None:
    program = (
        "import resource, re; print(re.search(r'SigIgn:\\s*(\\w+)', open('/proc/self/status').read())[1]);"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    await ended(spawn(spec(output, "sh", "-c", f'exec {sys.executable} -S -c "{program}"')))
    ignored, limit = output.text.split()
    # CPython itself ignores SIGPIPE (13) and SIGXFSZ (25); 32 and 33 are the C library's own business.
    assert int(ignored, 16) & ~((1 << 12) | (1 << 24) | (1 << 31) | (1 << 32)) == 0
    assert int(limit) <= soft


async def test_every_child_leads_a_session_of_its_own(output: Output) -> None:
    child = spawn(spec(output, "sleep", "60"))
    assert os.getsid(child.pid) == child.pid == os.getpgid(child.pid)
    child.signal_group(signal.SIGKILL)
    await ended(child)


async def test_limits_umask_and_user_are_in_force_and_the_pid_is_the_programs(output: Output) -> None:
    child = spawn(
        spec(output, "sh", "-c", "umask; ulimit -n; ulimit -c; id -u; id -g; echo $$", umask=0o027,
             limits={"nofile": 99, "core": 0}, user="nobody")
    )  # fmt: skip
    assert await ended(child) == Exit(status=0)
    mask, nofile, core, uid, _, pid = output.text.split()
    assert (mask, nofile, core, pid) == ("0027", "99", "0", str(child.pid))
    assert int(uid) == 65534


async def test_a_program_may_be_told_its_own_pid_and_is_given_descriptors(output: Output) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    fd = out_of_the_way(reader)
    os.write(writer, b"through the descriptor\n")
    os.close(writer)
    child = spawn(
        spec(output, "sh", "-c", "echo $LISTEN_PID $$; cat <&3", user="nobody", umask=0o027,
             pid_variables=["LISTEN_PID"], descriptors={3: fd})
    )  # fmt: skip
    os.close(fd)
    await ended(child)
    assert output.text == f"{child.pid} {child.pid}\nthrough the descriptor\n"


async def test_a_limit_that_may_not_be_set_is_named(output: Output) -> None:
    child = spawn(spec(output, "/bin/true", limits={"nofile": 1 << 40}))
    assert (await ended(child)).status == 1
    assert f"asyncsup: limits.nofile cannot be set to {1 << 40}\n" in output.text


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("no-such-program-anywhere", "command not found in PATH"),
        ("./missing", "no such file"),
        ("./folder", "is a folder"),
        ("./plain", "is not executable"),
        ("./broken", "cannot be started: Exec format error"),
        ("./script", "its first line names '/no/such/sh', which is not there"),
        ("./from-elsewhere", r"its first line names '/bin/sh\r', which is not there"),
    ],
)
async def test_a_program_that_cannot_run_is_named_with_the_reason(
    output: Output, command: str, says: str
) -> None:
    folder = output.path.parent
    (folder / "folder").mkdir()
    (folder / "plain").write_text("#!/bin/sh\n")
    (folder / "broken").write_bytes(b"\x7fELF nonsense")
    (folder / "broken").chmod(0o755)
    (folder / "script").write_text("#! /no/such/sh -e\n")
    (folder / "script").chmod(0o755)
    (folder / "from-elsewhere").write_bytes(b"#!/bin/sh\r\n")
    (folder / "from-elsewhere").chmod(0o755)
    with pytest.raises(SpawnError) as caught:
        spawn(spec(output, command))
    assert says in caught.value.message
    assert command.removeprefix("./") in caught.value.message


async def test_a_missing_folder_is_named(output: Output) -> None:
    with pytest.raises(SpawnError, match="cannot be started in /nowhere/at/all: No such file or directory"):
        spawn(spec(output, "/bin/true", directory=Path("/nowhere/at/all")))
    assert Path.cwd().exists()


async def test_a_group_is_empty_only_when_its_last_member_has_ended(output: Output) -> None:
    fifo = output.path.parent / "fifo"
    os.mkfifo(fifo)
    child = spawn(spec(output, "sh", "-c", f"read line < {fifo} & echo started; exit 0"))
    assert await ended(child) == Exit(status=0)
    assert len(group_members(child.pid)) == 1
    empty = asyncio.Event()
    when_groups_empty([child.pid], empty.set)
    assert not empty.is_set()
    with fifo.open("w") as writer:
        writer.write("go\n")
    await asyncio.wait_for(empty.wait(), 60)
    assert group_members(child.pid) == []


async def test_an_empty_group_calls_back_at_once(output: Output) -> None:
    child = spawn(spec(output, "true"))
    await ended(child)
    called = []
    when_groups_empty([child.pid], lambda: called.append(True))
    assert called == [True]


async def test_an_end_that_somebody_else_has_reaped_is_told_once(output: Output) -> None:
    child = spawn(spec(output, "true"))
    told: list[Exit] = []
    child.on_exit(told.append)
    os.waitpid(child.pid, 0)
    async with asyncio.timeout(60):
        while child.alive:
            await asyncio.sleep(0)
    assert told == [Exit()]


async def test_an_end_is_told_once_whatever_goes_wrong_before_the_child_is_reaped(output: Output) -> None:
    loop = asyncio.get_running_loop()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
    told: asyncio.Future[Exit] = loop.create_future()

    def fail(ended: Exit) -> None:
        raise OSError(str(ended))

    child = spawn(spec(output, "sh", "-c", "exit 7"))
    child.on_exit(told.set_result, before_reaping=fail)
    assert await asyncio.wait_for(told, 60) == Exit(status=7)
    assert not child.alive
    await asyncio.sleep(0)
    assert [str(error) for error in errors] == ["exit status 7"]
    loop.set_exception_handler(None)


async def test_a_hundred_children_that_end_at_once_are_all_reaped(output: Output) -> None:
    before = set(children_of(os.getpid()))
    children = [spawn(spec(output, "sh", "-c", f"exit {number}")) for number in range(100)]
    results = await asyncio.gather(*(ended(child) for child in children))
    assert [result.status for result in results] == list(range(100))
    assert set(children_of(os.getpid())) <= before
