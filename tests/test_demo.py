"""`asyncsup demo` plays the four cases, and would say so if one went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from asyncsup import demo
from asyncsup.demo import CASES, Case
from asyncsup.errors import UsageError
from asyncsup.patch.manifest import Kind


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncsup", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_all_plays_go_as_they_should() -> None:
    result = run("demo", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["ok"]
    plays = outcome["plays"]
    assert len(plays) == len(CASES) * 2 * 2
    by_title = {play["title"]: play for play in plays}
    for format_ in ("native", "prototype"):
        warm = by_title[f"{CASES[0].title} ({format_} package)"]
        cold = by_title[f"{CASES[1].title} ({format_} package)"]
        assert (warm["exit_status"], cold["exit_status"]) == (0, 0)
        assert warm["pid_before"] == warm["pid_after"]
        assert cold["pid_before"] != cold["pid_after"]
        for case in CASES[2:]:
            refused = by_title[f"{case.title} ({format_} package)"]
            assert (refused["exit_status"], refused["code"]) == (20, case.refused_by)
    flipped = [play for play in plays if "flipped" in play["title"]]
    assert {play["exit_status"] for play in flipped} == {21}


def test_a_relative_folder_is_played_in_and_one_with_something_in_it_is_not(
    monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    monkeypatch.chdir(short_tmp)
    monkeypatch.setattr(demo, "CASES", CASES[2:3])
    assert demo.run_demo(keep=Path("new/folder")) == 0
    assert (short_tmp / "new/folder/asyncsup.toml").is_file()
    for folder, says in (("new", "is not empty"), ("new/folder/asyncsup.toml", "File exists")):
        with pytest.raises(UsageError, match=says):
            demo.run_demo(keep=Path(folder))


@pytest.mark.parametrize(
    "wrong",
    [
        Case(name="warm", title="x", kind=Kind.WARM, build=300, region="India"),
        Case(name="cold", title="x", kind=Kind.COLD, build=100, region=demo.REGION),
        Case(
            name="region", title="x", kind=Kind.WARM, build=300, region=demo.REGION, refused_by="gate.region"
        ),
        Case(
            name="build", title="x", kind=Kind.WARM, build=100, region=demo.REGION, refused_by="gate.region"
        ),
    ],
    ids=lambda case: case.name,
)
def test_a_play_that_goes_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: Case
) -> None:
    cases: Sequence[Case] = (wrong,)
    monkeypatch.setattr(demo, "CASES", cases)
    monkeypatch.setattr(demo, "PATIENCE_SECONDS", 10.0)
    assert demo.run_demo() == 1
    assert "NOT as it should be" in capsys.readouterr().out
