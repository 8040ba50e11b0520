"""Fuzzing, bounded: no mutant of a good input does anything unforeseen, and what is accepted reads alike.

Every run makes the same mutants (`chance.py`). ``ASYNCSUP_TESTS=all`` makes more of them, and others each
time; ``ASYNCSUP_SEED`` makes those of a run that found something again. `fuzz_with_coverage.py` looks for
mutants that reach new code, for as long as it is let.
"""

from __future__ import annotations

import os
import re
import resource
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Final

import pytest
import ssh_kit
import zip_forge
from chance import EVERYTHING, SEED, VARIABLE
from fuzz_json import FULL, judge_manifest, judge_prototype, mutate_json
from fuzz_kit import FindingError, Tally, foreseen, numbered
from fuzz_ssh import (
    MESSAGE,
    SignatureJudge,
    SignersJudge,
    mutate_lines,
    mutate_signature,
)
from fuzz_zip import (
    PackageJudge,
    delta_parts,
    good_packages,
    mutate_bytes,
    mutate_model,
    native_parts,
    prototype_parts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_archive import refuse
from told import Tell
from zip_forge import Part

from asyncsup.errors import UsageError
from asyncsup.patch.checksum import read_checksum

MORE: Final = 60 if EVERYTHING else 1
MEMORY_BYTES: Final = 256 << 20
"""More than this nothing needs that is made of a few kilobytes."""


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder without a disk behind it."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="as-fuzz-", dir=base) as name:
        yield Path(name)


def fuzz(
    what: str,
    count: int,
    tally: Tally,
    judge: Callable[[bytes], str],
    make: Callable[[Random], bytes],
    *,
    tell: Tell,
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index, random in enumerate(numbered(f"{SEED} {what}", count * MORE)):
        try:
            tally.judge(judge, make(random))
        except FindingError as finding:
            finding.add_note(f"{VARIABLE}={SEED}, {what} number {index}")
            raise
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    tell(str(tally))
    assert grown < MEMORY_BYTES
    # A mutator that breaks everything proves nothing, and so does one that breaks nothing.
    assert 0.01 < tally.verdicts["accepted"] / tally.verdicts.total() < 0.9
    assert len(tally.verdicts) > 1


def test_every_seed_is_good_to_begin_with(memory: Path) -> None:
    tally = Tally()
    judge = PackageJudge(memory, tally)
    assert "unzip" in judge.tools
    for seed in good_packages():
        assert judge(seed) == "accepted"
        with zipfile.ZipFile(memory / "patch.zip") as reader:
            assert reader.testzip() is None
    assert tally.compared["unzip"] == tally.compared["zipfile"] == len(good_packages())


def test_no_change_of_an_entry_deceives(memory: Path, tell: Tell) -> None:
    tally = Tally()
    models: Sequence[Callable[[], list[Part]]] = (native_parts, native_parts, delta_parts, prototype_parts)
    make = lambda random: mutate_model(random, random.choice(models)())  # noqa: E731
    fuzz("entries", 1200, tally, PackageJudge(memory, tally), make, tell=tell)
    assert tally.compared["unzip"] > 100


def test_no_change_of_the_bytes_deceives(memory: Path, tell: Tell) -> None:
    tally, good = Tally(), good_packages()
    make = lambda random: mutate_bytes(random, random.choice(good))  # noqa: E731
    fuzz("bytes", 3000, tally, PackageJudge(memory, tally), make, tell=tell)
    assert tally.compared["unzip"] > 100


def test_no_manifest_is_two_things(tell: Tell) -> None:
    fuzz("manifests", 4000, Tally(), judge_manifest, lambda random: mutate_json(random, FULL), tell=tell)


def test_no_prototype_manifest_is_two_things(tell: Tell) -> None:
    good = zip_forge.prototype_manifest()
    fuzz("prototype", 3000, Tally(), judge_prototype, lambda random: mutate_json(random, good), tell=tell)


def test_no_signature_deceives(tell: Tell) -> None:
    kinds = sorted(ssh_kit.KINDS)
    signatures = [ssh_kit.key(kind=kind).sign(MESSAGE) for kind in kinds]
    lines = "".join(f"{kind} {ssh_kit.key(kind=kind).line}\n" for kind in kinds)
    tally = Tally()
    make = lambda random: mutate_signature(random, random.choice(signatures), signatures)  # noqa: E731
    fuzz("signatures", 2000, tally, SignatureJudge(lines, tally), make, tell=tell)


def test_no_file_of_signers_is_two_things(tell: Tell) -> None:
    alice, bob = ssh_kit.key(), ssh_kit.key("bob")
    lines = (
        f'alice namespaces="asyncsup-patch",valid-after="20260101Z" {alice.line} a comment\n'
        f"bob@example.com {bob.line}\n*,!bob@example.com {alice.line}\n"
    )
    tally = Tally()
    make = lambda random: mutate_lines(random, lines).encode("utf-8", "replace")  # noqa: E731
    fuzz("signers", 500, tally, SignersJudge(alice.sign(MESSAGE), tally), make, tell=tell)
    assert tally.compared["ssh-keygen"] > 30


# --- FILE.sha256 --------------------------------------------------------------------------------------------

CHECKSUM_PIECES: Final = (
    b"p.zip", b"q.zip", b"./p.zip", b"/a/b/p.zip", b"p.zip\\n", b" ", b"  ", b" *", b"\t", b"*", b"\\", b"\n",
    b"\r\n", b"\r", b"\0", b"\x0b", b"\xe2\x80\xa8", b"\xc2\x85", b"\xff", b"SHA256 (p.zip) = ", b"#",
    b"0" * 64, b"F" * 64, b"a" * 63, b"b" * 65, b"c" * 64, b"  p.zip\n", b"  p.zip\n", b"  q.zip\n",
)  # fmt: skip


def test_no_checksum_file_is_two_things(memory: Path, tell: Tell) -> None:
    """What is found stands there, at the beginning of a line, and is the only one for this name."""
    listed = memory / "p.zip.sha256"

    def judge(data: bytes) -> str:
        listed.write_bytes(data)
        try:
            found = read_checksum(memory / "p.zip")
        except UsageError as error:
            return foreseen(error, data)
        if found is None or not re.search(
            rb"(?im)^[ \t\r]*\\?" + found.encode() + rb"(?:[ \t]|[ \t\r]*$)", data
        ):
            raise FindingError(f"read {found!r}", data)
        return "accepted"

    def make(random: Random) -> bytes:
        return b"".join(random.choice(CHECKSUM_PIECES) for _ in range(random.randint(1, 8)))

    fuzz("checksums", 4000, Tally(), judge, make, tell=tell)


# --- no structure at all ------------------------------------------------------------------------------------


@given(data=st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    assert refuse(data).error_code.startswith("zip.")


@given(seed=st.sampled_from(good_packages()), cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_package_that_is_still_on_its_way_is_called_truncated(seed: bytes, cut: float) -> None:
    """The inbox waits for such a file instead of rejecting it."""
    assert refuse(seed[: int(cut * len(seed))]).error_code == "zip.truncated"
