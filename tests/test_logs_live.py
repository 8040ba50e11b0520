"""Output of real targets under a real supervisor: who waits for whom, what is lost, what the kernel does."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, wait_for
from test_survival_under_load import Floods, check_lines
from test_survival_under_load import Stage as Survivors
from test_survival_under_load import serve as patient_serve
from traced import attached, require_strace

from asyncsup.client import ControlClient
from asyncsup.logfile import RotatingFile
from asyncsup.logs import Format, OutputStream

PATIENCE_SECONDS = 100.0

serve = patient_serve

WRITER = """
import sys
lines = int(sys.argv[1])
for first in range(0, lines, 1000):
    sys.stdout.write("".join(f"{n:09d} {'x' * 30}\\n" for n in range(first, first + 1000)))
"""
TICKER = """
import itertools, signal, sys, time
ending = []
signal.signal(signal.SIGTERM, lambda *_: ending.append(1))
for n in itertools.count():
    print(f"{n:09d} {'x' * 30}", flush=True)
    if n % 20 == 0:
        time.sleep(0.001)
        if ending:
            break
with open(sys.argv[1], "w") as account:
    account.write(str(n + 1))
"""


def command(program: str, *arguments: object) -> str:
    return f"command = {json.dumps([sys.executable, '-c', program, *map(str, arguments)])}\n"


def files_of(path: Path) -> list[Path]:
    """Oldest first."""
    names = [found.name for found in path.parent.glob(f"{path.name}.*")]
    rotated = {int(name.split(".")[3]): name for name in names if not name.endswith(".part")}
    older = [path.with_name(rotated[number]) for number in sorted(rotated, reverse=True)]
    return [*older, *([path] if path.exists() else [])]


def read_on(client: ControlClient, chunk: dict[str, Any]) -> list[dict[str, Any]]:
    return list(client.call("logs.follow", {"cursors": [chunk["cursor"]], "timeout": 0})["chunks"])


def has_output(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 1000


def numbers_in(paths: list[Path]) -> list[int]:
    found: list[int] = []
    for path in paths:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found += map(int, re.findall(rb"(\d{9}) x{30}", data))
    return found


def ended(client: ControlClient, name: str) -> bool:
    (found,) = client.call("status", names=[name])["targets"]
    return bool(found["state"] == "exited")


@pytest.mark.parametrize("format_", ["raw", "prefix", "timestamp", "json"])
def test_a_follower_that_never_reads_on_holds_up_nobody_and_finds_everything_later(
    serve: Serve, format_: str
) -> None:
    lines = 200_000
    client = serve.start(
        f"[target.web]\n{command(WRITER, lines)}restart = 'never'\nmin_uptime = 0\nautostart = false\n"
        f"log = {{ format = '{format_}', max_size = '300KB', max_files = 1000, compress = 'gzip' }}\n"
    )
    cursors = [chunk["cursor"] for chunk in client.call("logs", name="web")["chunks"]]
    client.call("start", names=["web"], wait=False)
    slow = ControlClient(serve.endpoint)
    (chunk,) = slow.call("logs.follow", cursors=cursors)["chunks"]
    # It has its answer, and asks for nothing any more, while some thirty files come to be.
    wait_for(lambda: ended(client, "web"), "the program to have written everything", PATIENCE_SECONDS)
    log = serve.folder / ".asyncsup/logs/web.0.log"
    assert len(files_of(log)) > 20
    text = chunk["text"]
    while chunks := read_on(slow, chunk):
        (chunk,) = chunks
        assert not chunk["gap"]
        text += chunk["text"]
    assert [int(number) for number in re.findall(r"(\d{9}) x{30}", text)] == list(range(lines))
    slow.close()
    client.close()


@pytest.mark.anyio
@pytest.mark.parametrize("format_", ["raw", "prefix", "timestamp", "json"])
async def test_one_that_floods_has_one_turn_before_it_is_the_next_ones(
    tmp_path: Path, format_: Format
) -> None:
    def stream(name: str, format_: Format) -> OutputStream:
        file = RotatingFile(tmp_path / f"{name}.log", max_size=1 << 20, max_files=2)
        return OutputStream(tmp_path / name, file, instance=f"{name}:0", stream="stdout", format_=format_)

    flooding, quiet = stream("flooding", format_), stream("quiet", "raw")
    turns = itertools.count()
    move = flooding._move

    def counted() -> int:
        next(turns)
        return move()

    flooding._move = counted  # type: ignore[method-assign]
    end = flooding.open_child_end()
    flood = await asyncio.create_subprocess_exec("yes", "x" * 60, stdout=end)
    os.close(end)
    end = quiet.open_child_end()
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while next(turns) < 100:
                await flooding.growth()
            for _ in range(100):
                while quiet._pause is not None:
                    await asyncio.sleep(0.001)
                growth, before = quiet.growth(), next(turns)
                os.write(end, b"a line\n")
                await growth
                assert next(turns) - before <= 3  # with this look itself
    finally:
        flood.kill()
        await flood.wait()
        os.close(end)
        for each in (flooding, quiet):
            each.close()
            each.file.close()
    assert (tmp_path / "quiet.log").read_bytes() == b"a line\n" * 100


def test_raw_output_never_enters_the_supervisor(serve: Serve) -> None:
    require_strace()
    lines = 100_000
    client = serve.start(
        f"[target.web]\n{command(WRITER, lines)}restart = 'never'\nmin_uptime = 0\nautostart = false\n"
        "log = { max_size = '100MB' }\n"
    )
    client.call("logs", name="web")  # the stream is open
    trace = serve.folder / "trace"
    options = ("-e", "trace=splice,tee,read,readv,pread64,write,pwrite64")
    with attached(serve.supervisor, *options, trace=trace):
        client.call("start", names=["web"], wait=False)
        wait_for(lambda: ended(client, "web"), "the program to have written everything", PATIENCE_SECONDS)
    client.close()
    moved = {"splice": 0, "other": 0}
    for call, result in re.findall(r"(\w+)\(.*\) = (\d+)$", trace.read_text(), re.MULTILINE):
        if call == "splice":
            moved["splice"] += int(result)
        elif int(result) > 4096 or call == "tee":
            moved["other"] += int(result)
    assert moved == {"splice": lines * 41, "other": 0}


@pytest.mark.parametrize("format_", ["raw", "prefix"])
def test_output_a_full_disk_has_no_room_for_is_counted_and_said_once(serve: Serve, format_: str) -> None:
    lines, room = 300_000, 4 << 20
    client = serve.start(
        f"[target.web]\n{command(WRITER, lines)}restart = 'never'\nmin_uptime = 0\nautostart = false\n"
        f"log = {{ max_size = '1GB', format = '{format_}' }}\n"
    )
    assert client.call("status")["targets"][0]["instances"][0]["lost_bytes"] == 0
    log = serve.folder / ".asyncsup/logs/web.0.log"
    # So a file can grow to this size and no further.
    before = resource.prlimit(serve.supervisor, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    try:
        client.call("start", names=["web"], wait=False)
        wait_for(lambda: ended(client, "web"), "the program to have written everything", PATIENCE_SECONDS)
        (found,) = client.call("status")["targets"][0]["instances"]
    finally:
        resource.prlimit(serve.supervisor, resource.RLIMIT_FSIZE, before)
    assert log.stat().st_size <= room
    written = log.read_bytes().replace(b"web:0 | ", b"")
    assert found["lost_bytes"] == lines * 41 - len(written) > 0
    events = client.call("events.since", seq=0)["events"]
    (said,) = [event for event in events if event["type"] == "instance.output_lost"]
    assert (said["instance"], said["stream"], said["path"]) == ("web:0", "stdout", str(log))
    assert serve.errors().count("output is lost") == 1
    shown = subprocess.run(
        [sys.executable, "-m", "asyncsup", "-c", str(serve.config), "status"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "of its output lost" in shown.stdout
    # With room again, what is written then is there.
    client.call("start", names=["web"], wait=False)
    wait_for(lambda: ended(client, "web"), "the program to have written everything", PATIENCE_SECONDS)
    assert len(log.read_bytes().replace(b"web:0 | ", b"")) == len(written) + lines * 41
    client.close()


def test_files_that_somebody_else_rotates_lose_nothing(serve: Serve) -> None:
    account = serve.folder / "account"
    client = serve.start(
        f"[target.web]\n{command(TICKER, account)}stop_timeout = '1h'\n"
        "[target.other]\ncommand = 'sleep 1000'\n[defaults.log]\nstdout = '${name}.log'\n"
    )
    log, moved = serve.folder / "web.log", []
    for number in range(20):
        wait_for(lambda: log.exists() and log.stat().st_size > 0, "some output")
        moved.append(serve.folder / f"moved.{number}")
        log.rename(moved[-1])
        asyncsup = [sys.executable, "-m", "asyncsup", "-c", str(serve.config)]
        if number == 0:
            done = subprocess.run(
                [*asyncsup, "logs", "--reopen", "web"], check=True, capture_output=True, text=True
            )
            assert done.stdout == f"opened anew: {log}\n"
        else:
            assert client.call("logs.reopen", names=["web"])["paths"] == [str(log)]
        size = moved[-1].stat().st_size
        subprocess.run(["gzip", moved[-1]], check=True)
        moved[-1] = Path(f"{moved[-1]}.gz")
        assert len(gzip.decompress(moved[-1].read_bytes())) == size
    client.call("stop", names=["web"])
    client.close()
    assert numbers_in([*moved, log]) == list(range(int(account.read_text())))


def test_only_log_settings_restart_nothing_and_lose_nothing(serve: Serve) -> None:
    account = serve.folder / "account"
    base = f"[target.web]\n{command(TICKER, account)}stop_timeout = '1h'\n"
    client = serve.start(base)
    client.call("wait", {"names": ["web"], "for": "ready", "timeout": 30})
    logs = [serve.folder / ".asyncsup/logs/web.0.log"]
    (before,) = client.call("status", names=["web"])["targets"]
    for number, format_ in enumerate(
        ["timestamp", "json", "prefix", "raw", "json", "timestamp", "raw", "prefix", "raw"]
    ):
        logs.append(serve.folder / f"{number}.log")
        settings = f"format = '{format_}', stdout = '{number}.log', max_age = '1h', max_size = '10MB'"
        serve.write(f"{base}log = {{ {settings} }}\n")
        plan = client.call("config.plan")
        assert plan["restarted"] == {}
        assert {"log.stdout", "log.format"} <= set(plan["in_place"]["web"])
        client.call("config.apply")
        wait_for(partial(has_output, logs[-1]), "output in the new file")
    (after,) = client.call("status", names=["web"])["targets"]
    assert after["instances"][0]["pid"] == before["instances"][0]["pid"]
    client.call("stop", names=["web"])
    client.close()
    # A line that was cut in two by a change of files is whole in the two together.
    text = b"".join(log.read_bytes() for log in logs)
    assert [int(n) for n in re.findall(rb"(\d{9}) x{30}", text)] == list(range(int(account.read_text())))


FLOODS: Floods = {
    "raw": ("raw", 500, 0.01, 0),
    "named": ("prefix", 500, 0.01, 0),
    "stamped": ("timestamp", 500, 0.01, 0),
}


@pytest.mark.parametrize(
    "fault",
    ["logs.rotate.shifted:kill:2", "logs.compress.done:kill:2", "logs.compress.renamed:kill:1",
     "logs.compress.renamed:kill:3"],
)  # fmt: skip
def test_killed_in_the_middle_of_a_rotation_nothing_is_lost_or_doubled(serve: Serve, fault: str) -> None:
    stage = Survivors(serve, FLOODS)
    serve.alone = True
    serve.environ["ASYNCSUP_FAILPOINT"] = fault
    serve.begin()
    process = serve.process
    assert process is not None
    process.wait(PATIENCE_SECONDS)
    del serve.environ["ASYNCSUP_FAILPOINT"]
    client = serve.start()
    folder = serve.folder / ".asyncsup/logs"
    began = len(list(folder.glob("*.gz")))
    wait_for(lambda: len(list(folder.glob("*.gz"))) > began + 4, "more to be compressed", PATIENCE_SECONDS)
    client.call("stop", {"names": ["all"]}, timeout=PATIENCE_SECONDS)
    check_read_back(client, stage)
    client.close()
    assert serve.stop(timeout=PATIENCE_SECONDS) == 0
    check_lines(stage)
    assert not list(folder.glob("*.part"))
    assert "Traceback" not in serve.errors()


def check_read_back(client: ControlClient, stage: Survivors) -> None:
    """What `logs` gives is what there is: nothing twice where a file is there in both forms."""
    for name in stage.floods:
        chunk: dict[str, Any] = client.call("logs", name=f"{name}:0", since=0)["chunks"][0]
        text = chunk["text"]
        while chunks := read_on(client, chunk):
            (chunk,) = chunks
            text += chunk["text"]
        seen: dict[str, int] = {}
        for life, number in re.findall(r"(\S+-\d+-\d+) (\d{9}) x{30}\n", text):
            assert int(number) == seen.get(life, 0)
            seen[life] = int(number) + 1
        assert seen
