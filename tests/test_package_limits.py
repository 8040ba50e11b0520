"""`[patch.limits]`: who keeps them, and what is said when a package is above one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import Serve

from asyncsup import cli
from asyncsup.errors import RemoteError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a folder `new` of three files and no configuration anywhere near."""
    for name in ("ASYNCSUP_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    for number in range(3):
        (tmp_path / "new" / f"{number}.txt").write_text(f"file {number}")
    return tmp_path


def build(*options: str) -> list[str]:
    return [
        "patch", "build", "new", "-o", "patch.zip", "--name", "n", "--build", "1", "--warm", "-t", "web",
        "-r", "local", "--json", *options,
    ]  # fmt: skip


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    status = cli.main(argv)
    return status, orjson.loads(capsys.readouterr().out)


def test_build_and_verify_keep_the_limits_of_the_configuration(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build(), capsys)[0] == 0
    assert run(["patch", "verify", "patch.zip", "--json"], capsys)[0] == 0
    (here / "small.toml").write_text("[patch.limits]\nfiles = 3\n")
    for argv in (build("-c", "small.toml"), ["patch", "verify", "patch.zip", "--json", "-c", "small.toml"]):
        status, answer = run(argv, capsys)
        assert status == (1 if argv[1] == "build" else 21)
        assert "4 entries, the limit is 3 (`files` in [patch.limits])" in answer["error"]["message"]
    (here / "small.toml").rename(here / "asyncsup.toml")  # found without being named
    assert run(["patch", "verify", "patch.zip", "--json"], capsys)[0] == 21


def test_a_mistake_elsewhere_in_the_configuration_does_not_matter_and_one_in_the_limits_does(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "asyncsup.toml").write_text("[target.web]\ncommand = 3\n[patch.limits]\nfiles = 4\n")
    assert run(build(), capsys)[0] == 0
    (here / "asyncsup.toml").write_text("[patch.limits]\nfiles = 0\n")
    status, answer = run(build(), capsys)
    assert (status, answer["error"]["problems"][0]["key"]) == (5, "patch.limits.files")


def test_the_supervisor_keeps_its_limits_and_says_which(
    here: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build(), capsys)[0] == 0
    size = (here / "patch.zip").stat().st_size
    (serve.folder / "root").mkdir()
    text = '[target.web]\ncommand = "sleep 1000"\nautostart = false\nroot = "root"\n[patch]\ntrust = "none"\n'
    with serve.start(f"{text}[patch.limits]\npackage_size = {size - 1}\nfiles = 4\n") as client:
        with pytest.raises(RemoteError) as caught:
            client.call("patch.apply", path=str(here / "patch.zip"))
        assert caught.value.error_code == "zip.package_size"
        assert f"the limit is {size - 1} (`package_size` in [patch.limits])" in caught.value.message
        with pytest.raises(RemoteError) as caught:
            client.upload(here / "patch.zip")
        assert caught.value.error_code == "zip.package_size"
        assert not list((serve.folder / ".asyncsup/uploads").iterdir())
