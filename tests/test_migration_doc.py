"""`docs/migration.md` and `docs/operations.md` name keys, commands and states that exist."""

from __future__ import annotations

import re
from pathlib import Path

from asyncsup.cli.verbs import VERBS
from asyncsup.config import parse_config
from asyncsup.config.schema import config_schema

DOCS = Path(__file__).parent.parent / "docs"
MIGRATION = (DOCS / "migration.md").read_text()
OPERATIONS = (DOCS / "operations.md").read_text()


def keys_of(schema: object) -> set[str]:
    """Every name of a key anywhere in the schema."""
    if isinstance(schema, dict):
        own = set(schema.get("properties", {}))
        return own.union(*(keys_of(value) for value in schema.values()))
    if isinstance(schema, list):
        return set().union(*(keys_of(value) for value in schema))
    return set()


def test_the_last_column_has_keys_there_are() -> None:
    known = keys_of(config_schema()) | {"supervisor", "group", "x"}
    table = MIGRATION[MIGRATION.index("## Programs") : MIGRATION.index("## What is different")]
    rows = [line.split(" | ")[-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    found = 0
    for row in rows:
        for code in re.findall(r"`([a-z_.]+)(?: = [^`]*)?`", row):
            found += 1
            assert set(code.split(".")) <= known, code
    assert found > 40


def test_commands_exist() -> None:
    for page in (MIGRATION, OPERATIONS):
        for line in re.findall(r"asyncsup ((?:-c \S+ )?[a-z].*)", page):
            words = re.sub(r"^-c \S+ ", "", line).split()
            table = VERBS
            word = words[0].strip("`,;:.")
            if word in {"serve", "itself"} or not re.fullmatch(r"[a-z]+", word):
                continue
            assert word in table, line
            found = table[word]
            if isinstance(found, dict):
                assert words[1].strip("`,;:.") in found, line


def test_the_first_configuration_is_one() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", MIGRATION, re.DOTALL)
    config = parse_config(text, path=Path("/etc/asyncsup.toml"), machine=None)
    assert config.targets["web"].stop_timeout == 30.0
