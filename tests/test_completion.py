"""Completion for shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Serve

CONFIG = (
    '[target.web]\ncommand = ["sleep", "1000"]\ninstances = 2\n[target.db]\ncommand = ["sleep", "1000"]\n'
    '[group.backend]\ntargets = ["db"]\n'
)


def complete(*words: str, endpoint: str = "ipc:///nowhere") -> list[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncsup", "complete", "--", *words],
        env={**os.environ, "ASYNCSUP_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.splitlines()


def test_what_can_come_next(serve: Serve) -> None:
    client = serve.start(CONFIG)
    here = serve.endpoint
    assert complete("sta") == ["status", "start"]
    assert complete("patch", "ro") == ["rollback"]
    assert "--timeout" in complete("restart", "--")
    assert complete("--end") == ["--endpoint"]
    assert complete("restart", "w", endpoint=here) == ["web", "web:0", "web:1"]
    assert complete("restart", "web", "", endpoint=here) == ["all", "web", "db", "backend", "web:0", "web:1"]
    assert complete("scale", "web", "b", endpoint=here) == ["backend"]
    assert complete("events", "ba", endpoint=here) == ["backend"]
    assert complete("signal", "HUP", "web", "d", endpoint=here) == ["db"]
    assert complete("wait", "--for", "r") == ["ready", "running"]
    assert complete("completion", "z") == ["zsh"]
    for typed in (("--endpoint", here), (f"--endpoint={here}",), ("-c", str(serve.config))):
        assert complete(*typed, "restart", "d") == ["db"]
        assert complete("restart", *typed, "d") == ["db"]
    assert complete("-c", "") == []
    assert complete("nonsense", "") == []
    client.close()


def test_without_a_supervisor_there_are_no_names() -> None:
    assert complete("restart", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one_of_its_shell(shell: str) -> None:
    script = subprocess.run(
        [sys.executable, "-m", "asyncsup", "completion", shell],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert "asyncsup complete --" in script
    if (program := shutil.which(shell)) is None:
        return
    # "-n": read, and do nothing.
    subprocess.run([program, "-n"], input=script, text=True, check=True, timeout=60)


def test_bash_completes(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "asyncsup").write_text(f'#!/bin/sh\nexec {sys.executable} -m asyncsup "$@"\n')
    (folder / "asyncsup").chmod(0o755)
    script = (
        "source <(asyncsup completion bash); COMP_WORDS=(asyncsup patch pl); COMP_CWORD=2; _asyncsup; "
        'echo "${COMPREPLY[@]}"'
    )
    told = subprocess.run(
        [bash, "--norc", "-c", script],
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert told.stdout == "plan\n", told.stderr
