"""`docs/design/0012-behaviours-of-peers.md` names the tests of what peers pin: hold it to that."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from told import Tell

REPOSITORY: Final = Path(__file__).parent.parent
TEXT: Final = (REPOSITORY / "docs/design/0012-behaviours-of-peers.md").read_text()
ROWS: Final = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+) \|$", TEXT, re.MULTILINE)
REFERENCE: Final = re.compile(r"`(tests/test_\w+\.py)::(test_\w+)`")
PEERS: Final = {"supervisord", "circus", "process-compose", "pm2"}


@cache
def functions_of(file: str) -> frozenset[str]:
    """What pytest would collect from a file: none of ours has a class of tests."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse((REPOSITORY / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, functions))


@pytest.mark.parametrize(("file", "name"), sorted(set(REFERENCE.findall(TEXT))))
def test_a_test_that_is_named_exists(file: str, name: str) -> None:
    assert name in functions_of(file)


def test_all_seventy_are_there_in_order() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, 71))
    assert len(re.findall(r"^\| *\d", TEXT, re.MULTILINE)) == len(ROWS)


@pytest.mark.parametrize(("number", "peers", "here"), [(n, peers, here) for n, _, peers, here in ROWS])
def test_a_row_names_tests_or_says_why_there_are_none(number: str, peers: str, here: str) -> None:
    assert set(peers.split(", ")) <= PEERS
    first = here.partition("; ")[0]
    named = all(REFERENCE.fullmatch(part) for part in first.split(", "))
    assert named or re.match(r"(does not apply|not yet): \S", here), number


def test_what_is_not_there_yet_is_counted(tell: Tell) -> None:
    left = [number for number, _, _, here in ROWS if "not yet: " in here]
    tell(f"{len(left)} of {len(ROWS)} ({', '.join(left)})")
