"""What a process gets from its supervisor, and what it must not get."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from conftest import Serve, wait_for

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

TELL = """\
import json, os, sys
facts = {
    "env": dict(os.environ), "uid": os.getuid(), "gid": os.getgid(), "groups": sorted(os.getgroups()),
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
}
print(json.dumps(facts), flush=True)
import time
time.sleep(1000)
"""


def told(serve: Serve, settings: str, **environ: str) -> dict[str, object]:
    """What a program finds that is run with these settings."""
    import json

    serve.folder.chmod(0o755)
    serve.environ |= environ
    program = serve.folder / "tell.py"
    program.write_text(TELL)
    # Others may not reach the interpreter of a virtual environment, but the system's.
    client = serve.start(f'[target.a]\ncommand = ["/usr/bin/env", "python3", "-I", "{program}"]\n{settings}')

    def output() -> str:
        return str(client.call("logs", name="a")["chunks"][0]["text"])

    line = wait_for(lambda: output() if output().endswith("\n") else None, "the program to tell")
    client.close()
    facts: dict[str, object] = json.loads(line)
    return facts


@root_only
def test_another_user_gets_their_own_home_and_groups(serve: Serve) -> None:
    record = pwd.getpwnam("games")
    facts = told(
        serve, 'user = "games"\ndirectory = "/"\n', HOME="/root", LOGNAME="root", PATH="/usr/bin:/bin"
    )
    env = facts["env"]
    assert isinstance(env, dict)
    assert {name: env[name] for name in ("HOME", "USER", "LOGNAME", "SHELL")} == {
        "HOME": record.pw_dir,
        "USER": "games",
        "LOGNAME": "games",
        "SHELL": record.pw_shell,
    }
    assert (facts["uid"], facts["gid"]) == (record.pw_uid, record.pw_gid)
    assert facts["groups"] == sorted(os.getgrouplist("games", record.pw_gid))


@root_only
def test_a_group_alone_keeps_the_user_and_leaves_no_other_group(serve: Serve) -> None:
    record = pwd.getpwnam("games")
    facts = told(serve, f'group = "{record.pw_gid}"\n')
    assert (facts["uid"], facts["gid"]) == (0, record.pw_gid)
    assert facts["groups"] in ([], [record.pw_gid])


def test_what_the_configuration_says_of_them_counts(serve: Serve) -> None:
    facts = told(serve, 'env = { HOME = "/elsewhere" }\n', HOME="/root", PATH="/usr/bin:/bin")
    env = facts["env"]
    assert isinstance(env, dict)
    assert env["HOME"] == "/elsewhere"


def test_no_descriptor_leaks(serve: Serve, tmp_path: Path) -> None:
    facts = told(serve, "", PATH="/usr/bin:/bin")
    fds = facts["fds"]
    assert isinstance(fds, list)
    # Its own three, and the one with which it lists them.
    assert fds[:3] == [0, 1, 2]
    assert len(fds) == 4
