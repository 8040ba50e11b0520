"""Cold patches without a lost request, as the second part of ``docs/programs.md`` has them, under a load.

The tests take both configurations, asyncsup's and the program's, from there; only folders and ports differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import Serve, wait_for
from test_real_programs import COLD, PAGE, Program, Stage, by_http, code_blocks, need

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from load import Load

from asyncsup.errors import RemoteError
from asyncsup.patch.manifest import Kind

PATCHES = ["two", "six", "ten"]
"""What the program answers after each; it begins with ``one``."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program, and what it can do.

    Attributes:
        keeps: whether kept connections lose nothing either.
        other: what is changed in its recipe first.
    """

    program: Program
    keeps: bool = True
    other: tuple[str, str] = ("", "")

    @property
    def name(self) -> str:
        return self.program.name + self.other[1].replace('"', "-").rstrip("-")


def program(
    name: str, *, file: str, port: int, binary: str | None = None, broken: str = '"one" ("'
) -> Program:
    return Program(
        name=name, binary=binary or name, port=port, file=file, observe=by_http, change=('"one"', '"two"'),
        broken=broken,
    )  # fmt: skip


GUNICORN = program("gunicorn", file="app.py", port=8000)

CASES = [
    Case(program=GUNICORN),
    Case(program=GUNICORN, other=('"sync"', '"gthread"'), keeps=False),
    Case(program=program("uvicorn", file="app.py", port=8000)),
    Case(program=program("hypercorn", file="app.py", port=8000)),
    Case(program=program("aiohttp", binary="python3", file="service.py", port=8080)),
    Case(program=program("nginx", file="nginx.conf", port=8080, broken='"one"; nonsense'), keeps=False),
    Case(program=program("haproxy", file="haproxy.cfg", port=8080, broken='"one" nonsense')),
    Case(program=program("node", file="server.js", port=8080)),
]


def cold_recipes() -> dict[str, list[str]]:
    _, found, text = PAGE.read_text().partition(f"\n## {COLD}\n")
    assert found
    return code_blocks(text, level=3)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def staged(serve: Serve, request: pytest.FixtureRequest) -> Iterator[tuple[Case, Stage]]:
    case: Case = request.param
    need(case.program)
    blocks = cold_recipes()[case.program.name]
    if case.other[0]:
        assert any(case.other[0] in block for block in blocks)
        blocks = [block.replace(*case.other) for block in blocks]
    made = Stage(serve, case.program, blocks, Kind.COLD)
    yield case, made
    made.client.close()


def went_on(loads: Sequence[Load], seen: Sequence[int]) -> bool:
    return all(len(load.results.samples) > count + 5 for load, count in zip(loads, seen, strict=True))


def test_a_cold_patch_loses_nothing(staged: tuple[Case, Stage]) -> None:
    case, stage = staged
    before = stage.ready()["pid"]
    assert stage.answer() == "one", stage.serve.errors()
    url = f"http://127.0.0.1:{stage.port}/"

    def others() -> object:
        return stage.client.call("status", names=[stage.name])["targets"][0]["others"]

    with (
        Load(url, rate=40, timeout=60) as new,
        Load(url, mode="keep-alive", rate=40, connections=5, timeout=60) as kept,
    ):
        loads = (new, kept)

        def lost_on_kept_connections() -> int:
            """Where the program closes idle connections at its stop, a request that comes just then finds no
            one: at most one on each connection it had."""
            summary = kept.results.between()
            assert summary.outcomes.keys() <= {"ok", "stale"}, summary
            return summary.failed

        with pytest.raises(RemoteError) as caught:
            stage.patch(case.program.change[0], case.program.broken)
        assert caught.value.error_code == "patch.rolled_back", caught.value.message
        wait_for(lambda: not others(), "the broken one to go")
        assert stage.now["pid"] == before, "the old one was restarted"
        assert lost_on_kept_connections() == 0
        now = "one"
        for replaced, answer in enumerate(PATCHES, 1):
            stage.patch(f'"{now}"', f'"{answer}"')
            now = answer
            wait_for(lambda: not others(), "the old one to go", 30.0)
            stage.answers(answer)
            seen = [len(load.results.samples) for load in loads]
            wait_for(partial(went_on, loads, seen), "requests after it")
            assert lost_on_kept_connections() <= (0 if case.keeps else replaced * kept.most_open)
    after = stage.now
    assert after["pid"] != before
    assert after["restarts"] == 0
    assert new.results.between().failed == 0, new.results.between()
    assert lost_on_kept_connections() <= (0 if case.keeps else len(PATCHES) * kept.most_open)

    stage.client.call("stop", names=[stage.name])
    wait_for(lambda: not stage.processes(), f"the end of {stage.processes()}")


def test_every_recipe_is_run() -> None:
    assert sorted(cold_recipes()) == sorted({case.program.name for case in CASES})
