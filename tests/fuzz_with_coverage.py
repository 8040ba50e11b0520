"""Fuzzing that looks for mutants which reach new code; for people, not a part of the suite.

In a virtual environment with asyncsup and `atheris`::

    python tests/fuzz_with_coverage.py packages -max_total_time=600
    python tests/fuzz_with_coverage.py manifests|prototype|signatures|signers [OPTIONS OF LIBFUZZER] [CORPUS]

It ends at the first finding, and says what it was.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["asyncsup.patch"]):
    import ssh_kit
    import zip_forge
    from fuzz_json import FULL, judge_manifest, judge_prototype, mutate_json
    from fuzz_kit import Tally
    from fuzz_ssh import MESSAGE, SignatureJudge, SignersJudge, mutate_lines, mutate_signature
    from fuzz_zip import (
        PackageJudge,
        good_packages,
        mutate_bytes,
        mutate_model,
        native_parts,
        prototype_parts,
    )

Judge = Callable[[bytes], str]
Mutate = Callable[[Random, bytes], bytes]


def packages(folder: Path, tally: Tally) -> tuple[Judge, Mutate, Sequence[bytes]]:
    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.2:
            return mutate_model(random, random.choice((native_parts, prototype_parts))())
        return mutate_bytes(random, data)

    return PackageJudge(folder, tally), mutate, good_packages()


def manifests(_folder: Path, _tally: Tally) -> tuple[Judge, Mutate, Sequence[bytes]]:
    return judge_manifest, json_or_bytes, [FULL]


def prototype(_folder: Path, _tally: Tally) -> tuple[Judge, Mutate, Sequence[bytes]]:
    return judge_prototype, json_or_bytes, [zip_forge.prototype_manifest()]


def json_or_bytes(random: Random, data: bytes) -> bytes:
    try:
        return mutate_json(random, data)
    except ValueError:  # no JSON any more
        return atheris.Mutate(data, len(data) + 100)  # type: ignore[no-any-return]


def signatures(_folder: Path, tally: Tally) -> tuple[Judge, Mutate, Sequence[bytes]]:
    good = [ssh_kit.key(kind=kind).sign(MESSAGE) for kind in sorted(ssh_kit.KINDS)]
    lines = "".join(f"{kind} {ssh_kit.key(kind=kind).line}\n" for kind in ssh_kit.KINDS)
    return (
        SignatureJudge(lines, tally),
        lambda random, _: mutate_signature(random, random.choice(good), good),
        good,
    )


def signers(_folder: Path, tally: Tally) -> tuple[Judge, Mutate, Sequence[bytes]]:
    alice = ssh_kit.key()
    lines = f'alice namespaces="asyncsup-patch",valid-after="20260101Z" {alice.line} c\n*,!bob {alice.line}\n'

    def mutate(random: Random, data: bytes) -> bytes:
        return mutate_lines(random, data.decode("utf-8", "replace")).encode("utf-8", "replace")

    return SignersJudge(alice.sign(MESSAGE), tally), mutate, [lines.encode()]


WHAT = {each.__name__: each for each in (packages, manifests, prototype, signatures, signers)}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in WHAT:
        sys.exit(f"say what: {', '.join(WHAT)}")
    what = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="as-fuzz-") as name:
        tally = Tally()
        judge, mutate, good = WHAT[what](Path(name), tally)
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        for index, seed in enumerate(good):
            (corpus / str(index)).write_bytes(seed)

        def once(data: bytes) -> None:
            tally.judge(judge, data)

        def mutator(data: bytes, max_size: int, seed: int) -> bytes:
            random = Random(seed)
            if random.random() < 0.3:
                return atheris.Mutate(data, max_size)  # type: ignore[no-any-return]
            return mutate(random, data)[:max_size]

        atheris.Setup([*sys.argv, str(corpus)], once, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
