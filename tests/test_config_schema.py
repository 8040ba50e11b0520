"""The JSON Schema for editors agrees with the reader on the keys, on what is right and what plainly wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from asyncsup.config.schema import config_schema
from asyncsup.config.settings import LogConfig, PatchConfig, SupervisorConfig, TargetConfig, options
from asyncsup.scaffold import TEXT

DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"
EXAMPLES = [
    text
    for text in re.findall(r"^```toml\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    if text.startswith(("[", "#"))
]

SCHEMA = config_schema()
VALIDATOR = Draft202012Validator(SCHEMA)


def complaints(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(tomllib.loads(text))]


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_it_has_every_key_of_every_table() -> None:
    target = SCHEMA["$defs"]["target"]["properties"]
    assert set(target) == set(options(TargetConfig))
    assert set(target["log"]["properties"]) == set(options(LogConfig))
    assert set(SCHEMA["properties"]["supervisor"]["properties"]) == set(options(SupervisorConfig))
    assert set(SCHEMA["properties"]["patch"]["properties"]) == set(options(PatchConfig))


@pytest.mark.parametrize("text", [*EXAMPLES, TEXT])
def test_it_accepts_what_the_reference_shows(text: str) -> None:
    assert complaints(text) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[target.web]\ncomand = 'x'", "'comand' was unexpected"),
        ("[target.web]\ncommand = 7", "7 is not valid under any of the given schemas"),
        ("[target.web]\ninstances = -1", "-1 is less than the minimum of 0"),
        ("[target.web]\nrestart = 'allways'", "'allways' is not valid under any of the given schemas"),
        ("[target.web]\nstop_timeout = 'soon'", "'soon' is not valid under any of the given schemas"),
        ("[target.web]\nautostart = 'yes'", "'yes' is not valid under any of the given schemas"),
        ("[target.web.limits]\nnofiles = 5", "'nofiles' was unexpected"),
        ("[target.web.env]\nPORT = 8080", "8080 is not of type 'string'"),
        ("[suprevisor]\n", "'suprevisor' was unexpected"),
    ],
)
def test_it_refuses_what_is_plainly_wrong(text: str, complaint: str) -> None:
    assert any(complaint in each for each in complaints(text)), complaints(text)


@pytest.mark.parametrize(
    "text",
    [
        "[target.web]\nrestart = '${POLICY}'",
        "[target.web]\nstop_timeout = '${SECONDS}s'",
        "[target.web]\nstop_signal = 15",
        "[target.web]\ncommand = 'nginx -g \"daemon off;\"'",
    ],
)
def test_it_leaves_to_the_reader_what_depends_on_the_machine(text: str) -> None:
    assert complaints(text) == []


def test_the_command_prints_it_without_a_configuration(tmp_path: Path) -> None:
    def printed(*options: str) -> Any:
        command = [sys.executable, "-m", "asyncsup", "config", "schema", *options]
        return json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout)

    assert printed() == printed("--json") == SCHEMA
