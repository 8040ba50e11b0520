"""What tests tell reaches whoever reads what a run leaves, on several cores as well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

SUITE = """
import pytest

def test_goes_well(tell):
    tell("3 points")
    tell("and 2 faults")

@pytest.mark.parametrize("number", [1])
def test_goes_wrong(tell, number):
    tell(f"{number} point")
    assert not number
"""


def test_a_run_ends_with_what_its_tests_have_told(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from told import pytest_terminal_summary, tell\n")
    (tmp_path / "test_suite.py").write_text(SUITE)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "-c", "/dev/null"),
            *("-o", f"pythonpath={TESTS}", "--rootdir", str(tmp_path), str(tmp_path)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout
    _, _, summary = run.stdout.partition("what was looked at")
    choice, *told = summary.splitlines()[1:5]
    assert "ASYNCSUP_SEED=" in choice
    assert told == [
        "test_suite.py::test_goes_well: 3 points",
        "test_suite.py::test_goes_well: and 2 faults",
        "test_suite.py::test_goes_wrong[1]: 1 point",
    ]
