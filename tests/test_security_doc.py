"""`docs/security.md` names the test that shows each of its claims: hold it to that."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from hostile_packages import CASES, ELSEWHERE

TESTS: Final = Path(__file__).parent
TEXT: Final = (TESTS.parent / "docs/security.md").read_text()
REFERENCE: Final = re.compile(r"`(test_\w+)\.(test_\w+)`")

TUF: Final = (
    "arbitrary software installation", "rollback", "fast-forward", "indefinite freeze", "endless data",
    "slow retrieval", "extraneous dependencies", "mix-and-match", "wrong software installation",
    "malicious mirrors", "key compromise", "partial bundle installation",
)  # fmt: skip
"""What the specification's section 1.5.2 lists, what older ones had besides, and Uptane's own."""


@cache
def functions_of(module: str) -> frozenset[str]:
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in found)


@pytest.mark.parametrize(("module", "name"), sorted(set(REFERENCE.findall(TEXT))))
def test_a_test_that_is_named_exists(module: str, name: str) -> None:
    assert name in functions_of(module)


def test_every_attack_has_a_test_or_is_said_not_to_be_covered() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and line.count(" | ") == 2]
    attacks = [row for row in rows if not re.match(r"\| (attack|known as|place|`)", row)]
    assert len(attacks) > 30
    for row in attacks:
        _, stand, shown = row.strip("| ").split(" | ")
        assert REFERENCE.search(shown) or "Not covered" in stand or stand == "no tar", row


def test_every_attack_of_the_specification_has_a_row() -> None:
    for attack in TUF:
        assert re.search(rf"^\| {attack}", TEXT, re.MULTILINE), attack


def test_rows_of_bad_inputs_that_are_named_exist() -> None:
    known = {case.row for case in CASES} | set(ELSEWHERE)
    named = set(re.findall(r"`((?:zip-|M|T|L)\d+)`", TEXT))
    assert named
    assert named <= known
