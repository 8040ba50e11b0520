"""`asyncsup init`: what it writes works as it is, and with everything in it switched on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from asyncsup.config import load_config, parse_config
from asyncsup.errors import ConfigError, UsageError
from asyncsup.scaffold import TEXT, write_scaffold

_COMMENTED_OUT = re.compile(r"^#(?=[^\s#])", re.MULTILINE)


def test_what_is_written_is_valid_and_has_nothing_to_warn_about(tmp_path: Path) -> None:
    path = write_scaffold(tmp_path)
    assert path == tmp_path / "asyncsup.toml"
    config = load_config(path)
    assert list(config.targets) == ["hello"]
    assert config.warnings == ()


def test_nothing_but_the_example_differs_from_an_empty_configuration(tmp_path: Path) -> None:
    config, empty = load_config(write_scaffold(tmp_path)), parse_config("", path=tmp_path / "asyncsup.toml")
    assert (config.supervisor, config.patch) == (empty.supervisor, empty.patch)


def test_everything_switched_on_is_valid_once_there_is_a_root(tmp_path: Path) -> None:
    path = write_scaffold(tmp_path)
    path.write_text(_COMMENTED_OUT.sub("", TEXT))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem["key"] for problem in caught.value.details["problems"]] == ["target.worker.root"]
    (tmp_path / "work").mkdir()
    config = load_config(path)
    assert list(config.targets) == ["hello", "worker"]
    assert config.targets["worker"].root == tmp_path / "work"
    assert config.supervisor.region == config.targets["hello"].region == "us-east-1"


def _commented_out() -> list[str]:
    """The settings that are commented out before the example that needs a root."""
    before, header, _ = TEXT.partition("#[target.worker]")
    assert header
    return [line for line in before.splitlines() if _COMMENTED_OUT.match(line)]


def test_the_most_used_settings_are_there_to_be_switched_on() -> None:
    assert len(_commented_out()) >= 20


@pytest.mark.parametrize("line", _commented_out())
def test_every_setting_can_be_switched_on_alone(line: str, tmp_path: Path) -> None:
    assert TEXT.count(f"\n{line}\n") == 1
    text = TEXT.replace(f"\n{line}\n", f"\n{line[1:]}\n")
    assert list(parse_config(text, path=tmp_path / "asyncsup.toml").targets) == ["hello"]


def test_the_example_does_what_it_says(tmp_path: Path) -> None:
    command = load_config(write_scaffold(tmp_path)).targets["hello"].command
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().startswith("hello, it is ")
            assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_an_existing_configuration_is_left_alone_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "asyncsup.toml"
    path.write_text("mine")
    with pytest.raises(UsageError, match="init --force") as caught:
        write_scaffold(tmp_path)
    assert (caught.value.error_code, caught.value.exit_status) == ("init.exists", 2)
    assert path.read_text() == "mine"
    write_scaffold(tmp_path, force=True)
    assert path.read_text() == TEXT


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "asyncsup.toml").symlink_to("elsewhere.toml")
    with pytest.raises(UsageError) as caught:
        write_scaffold(tmp_path)
    assert caught.value.error_code == "init.exists"
    assert not (tmp_path / "elsewhere.toml").exists()


def test_the_folder_is_made(tmp_path: Path) -> None:
    assert write_scaffold(tmp_path / "new/deep").read_text() == TEXT


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_written_is_told(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is there and is no folder") as caught:
        write_scaffold(tmp_path / "file", force=force)
    assert caught.value.error_code == "init.failed"
    with pytest.raises(UsageError, match="cannot be written: Not a directory") as caught:
        write_scaffold(tmp_path / "file/below", force=force)
    assert caught.value.error_code == "init.failed"


def test_a_folder_of_this_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "asyncsup.toml").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        write_scaffold(tmp_path)
    with pytest.raises(UsageError, match="Is a directory"):
        write_scaffold(tmp_path, force=True)
