"""What large patches do to others: they are told of the progress, and nobody waits for them."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Serve, wait_for
from test_cli import on_terminal, process

from asyncsup.client import ControlClient
from asyncsup.patch.ahead import DEPTH, read_ahead
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

TEXT = """
[patch]
trust = "none"
probation = 0
[target.web]
command = "sleep 1000"
min_uptime = 0
root = "root"
layout = "{layout}"
"""


def package(folder: Path, files: dict[str, bytes], **keys: Any) -> Path:
    for path, content in files.items():
        (folder / "new" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "new" / path).write_bytes(content)
    (folder / "root").mkdir(exist_ok=True)
    arguments: dict[str, Any] = {
        "old": None, "new": folder / "new", "output": folder / "large.zip", "name": "large", "version": "1",
        "build": 1, "kind": Kind.WARM, "targets": ["web"], "regions": ["local"], **keys,
    }  # fmt: skip
    build_patch(**arguments)
    return folder / "large.zip"


@pytest.mark.parametrize("layout", ["overlay", "tree"])
def test_the_control_socket_answers_while_a_large_patch_is_staged(serve: Serve, layout: str) -> None:
    path = package(serve.folder, {f"d{n % 20}/f{n}.txt": b"%d " % n * 300 for n in range(1500)}, store=True)
    halfway = serve.folder / "failpoints"
    halfway.write_text("store.stage.written:hang:750")
    serve.environ["ASYNCSUP_FAILPOINT"] = f"@{halfway}"
    with serve.start(TEXT.format(layout=layout)) as client, ControlClient(serve.endpoint) as other:
        wait_for(lambda: client.call("status")["targets"][0]["state"] == "running", "the target")
        reports: list[Any] = []
        applying = threading.Thread(target=lambda: reports.append(other.call("patch.apply", path=str(path))))

        def is_under_way() -> bool:
            history = client.call("patch.history")["transactions"]
            return bool(history and history[0]["verdict"] is None)

        applying.start()
        wait_for(is_under_way, "an answer while the patch is under way")
        halfway.unlink()
        applying.join()
        assert reports[0]["verdict"] == "committed"
        events = client.call("events.since", seq=0)["events"]
        told = [event for event in events if event["type"] == "patch.progress"]
        assert 2 < len(told) <= 101
        assert [each["done"] for each in told] == sorted(each["done"] for each in told)
        assert told[-1]["done"] == told[-1]["total"]
        assert (serve.folder / "root/d1/f1.txt").read_bytes() == b"1 " * 300


def test_build_and_verify_show_progress_on_a_terminal_and_not_in_a_pipe(tmp_path: Path) -> None:
    path = package(tmp_path, {"big.bin": random.Random(1).randbytes(3 << 20)}, store=True)
    verify = ("patch", "verify", path)
    build = (
        "patch", "build", tmp_path / "new", "-o", tmp_path / "out.zip", "--name", "n", "--build", "1",
        "--warm", "-t", "web", "-r", "local",
    )  # fmt: skip
    for arguments in (verify, build):
        shown = on_terminal(*arguments, "--no-color")
        assert "\r[####" in shown
        assert "MiB of" in shown
        piped = process(*arguments)
        assert "%" not in piped.stdout + piped.stderr
        assert "%" not in on_terminal(*arguments, "--no-color", "--quiet")


# --- reading ahead ------------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read ahead"]


def test_pieces_come_in_order_and_each_may_be_used_while_others_are_read() -> None:
    buffers = [bytearray(4) for _ in range(DEPTH + 1)]

    def pieces() -> Iterator[memoryview]:
        for number in range(100):
            buffer = buffers[number % len(buffers)]
            buffer[:] = number.to_bytes(4, "little")
            yield memoryview(buffer)

    assert [int.from_bytes(piece, "little") for piece in read_ahead(pieces())] == list(range(100))
    assert threads() == []


def test_an_error_comes_out_where_it_is_waited_for() -> None:
    def pieces() -> Iterator[memoryview]:
        yield memoryview(b"one")
        raise OSError("the disk is gone")

    reading = read_ahead(pieces())
    assert bytes(next(reading)) == b"one"
    with pytest.raises(OSError, match="the disk is gone"):
        next(reading)
    assert threads() == []


def test_who_stops_early_leaves_no_thread_behind() -> None:
    def pieces() -> Iterator[memoryview]:
        while True:
            yield memoryview(os.urandom(4))

    reading = read_ahead(pieces())
    next(reading)
    assert threads() == ["read ahead"]
    reading.close()  # type: ignore[attr-defined]
    assert threads() == []
