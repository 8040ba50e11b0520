"""The two libraries that inflate mean the same, and what is written beside a patch's files is not lost."""

from __future__ import annotations

import os
import random
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from asyncsup.errors import PatchMalformedError
from asyncsup.patch import archive, fs

NOISE = random.Random(1)
CONTENTS = (
    b"",
    b"x",
    bytes(70_000),
    NOISE.randbytes(3_000),
    b" ".join(NOISE.choices([b"ab", b"cde"], k=9_000)),
)


DAMAGE = ("flip", "add", "cut", "insert")


def deflated(content: bytes, level: int, strategy: int) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    return compressor.compress(content) + compressor.flush()


def outcome(
    library: Any, compressed: bytes, size: int, crc: int, monkeypatch: pytest.MonkeyPatch
) -> bytes | str:
    """What an entry inflates to, or the code it is refused with."""
    monkeypatch.setattr(archive, "inflater", library)
    entry = archive.Entry(
        name="x", is_folder=False, method=archive.DEFLATED, crc=crc, compressed=len(compressed), size=size,
        offset=0, data_offset=0,
    )  # fmt: skip
    fd = os.memfd_create("entry")
    try:
        os.write(fd, compressed)
        whole = archive.read_small(fd, entry)
        assert whole == b"".join(bytes(piece) for piece in archive.stream(fd, entry))
        return whole
    except PatchMalformedError as error:
        return error.error_code
    finally:
        os.close(fd)


@given(
    content=st.sampled_from(CONTENTS),
    level=st.sampled_from([1, 6, 9]),
    strategy=st.sampled_from([zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_FIXED]),
    damage=st.lists(
        st.tuples(st.sampled_from(["flip", "add", "cut", "insert"]), st.floats(0, 1)), max_size=2
    ),
    declared=st.sampled_from([0, 0, 0, 1, -1]),
)
@settings(max_examples=400, deadline=None)
def test_zlib_and_isal_accept_the_same(
    content: bytes, level: int, strategy: int, damage: list[tuple[str, float]], declared: int
) -> None:
    compressed = bytearray(deflated(content, level, strategy))
    for kind, where in damage:
        at = min(int(where * len(compressed)), len(compressed) - 1)
        if kind == "flip" and compressed:
            compressed[at] ^= 1 << at % 8
        elif kind == "add":
            compressed += b"\0\1\2"
        elif kind == "cut":
            del compressed[max(at, 0) :]
        else:
            compressed[at:at] = b"\x55\xaa"
    size = max(0, len(content) + declared)
    with pytest.MonkeyPatch.context() as patched:
        ours, theirs = (
            outcome(library, bytes(compressed), size, zlib.crc32(content), patched)
            for library in (zlib, isal_zlib)
        )
    if isinstance(ours, bytes) or isinstance(theirs, bytes):
        assert ours == theirs


def test_early_syncs_begin_while_files_are_written_and_end_with_the_barrier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "EARLY_OBJECTS", 50)
    synced: list[str] = []
    real = fs._syncfs

    def syncfs(fd: int) -> None:
        synced.append(threading.current_thread().name)
        real(fd)

    monkeypatch.setattr(fs, "_syncfs", syncfs)
    with fs.opened(tmp_path) as folder, fs.Durability(folder) as durability:
        for number in range(120):
            with (tmp_path / str(number)).open("wb") as file:
                durability.file(file.fileno())
        durability.barrier()
    assert synced.count("early sync") >= 1
    assert synced[-1] == "MainThread", "the barrier has a sync of its own, after everything"
    assert "early sync" not in [thread.name for thread in threading.enumerate()]


def test_an_early_sync_that_fails_fails_the_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports a lost write once; whoever asks second hears that all is well."""
    monkeypatch.setattr(fs, "EARLY_OBJECTS", 50)

    def syncfs(_: int) -> None:
        if threading.current_thread().name == "early sync":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(fs, "_syncfs", syncfs)
    with fs.opened(tmp_path) as folder, fs.Durability(folder) as durability:
        for number in range(60):
            with (tmp_path / str(number)).open("wb") as file:
                durability.file(file.fileno())
        with pytest.raises(OSError, match="Input/output error"):
            durability.barrier()
