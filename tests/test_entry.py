"""Which files of its root a target runs, and which are merely named in its command."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncsup.config.settings import TargetConfig
from asyncsup.patch.entry import program_files


def files(base: Path, *command: str, directory: str = "work", **more: object) -> set[str]:
    root = base / "root"
    config = TargetConfig(name="web", command=command, directory=base / directory, root=root, **more)  # type: ignore[arg-type]
    return set(program_files(config))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for folder in ("root/bin", "root/lib", "work"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("root/bin/run", "root/app.py", "root/lib/real.py", "root/nginx.conf", "root/app.jar"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("{root}/bin/run", "bin/run"),
        ("../root/bin/run --fast", "bin/run"),
        ("python3 {root}/app.py", "app.py"),
        ("/usr/bin/python3.11 -u -X dev -Wd -X pycache_prefix= {root}/app.py data.json", "app.py"),
        ("python3 -OO -- {root}/app.py", "app.py"),
        ("sh -eu {root}/bin/run", "bin/run"),
        ("bash -o pipefail -x {root}/bin/run", "bin/run"),
        ("node --max-old-space-size=64 -r hook.js {root}/app.py", "app.py"),
        ("ruby -w -I {root}/lib {root}/app.py", "app.py"),
        ("perl -Mstrict {root}/app.py", "app.py"),
        ("php -c {root}/nginx.conf {root}/app.py", "app.py"),
        ("java -Xmx64m -cp {root}/lib -jar {root}/app.jar {root}/nginx.conf", "app.jar"),
    ],
)
def test_what_is_run(command: str, found: str, base: Path) -> None:
    assert files(base, *command.format(root=base / "root").split()) == {found}


@pytest.mark.parametrize(
    "command",
    [
        "nginx -c {root}/nginx.conf",
        "redis-server {root}/nginx.conf",
        "cat {root}/app.py",
        "python3 -m app {root}/app.py",
        "python3 -c pass {root}/app.py",
        "python3 server.py {root}/app.py",
        "python3 - {root}/app.py",
        "python3 --an-option-of-tomorrow {root}/app.py",
        "sh -c {root}/bin/run",
        "node --unknown {root}/app.py",
        "node --eval=1 {root}/app.py",
        "node --run=dev {root}/app.py",
        "java -cp {root}/app.jar Main {root}/app.py",
        "java @{root}/nginx.conf Main",
        "/usr/bin/env python3 {root}/app.py",
        "python3",
        "python3 {root}/${{instance}}.py",
        "python3 {root}-beside/app.py",
        "python3 {root}",
    ],
)
def test_what_is_not_or_not_for_certain(command: str, base: Path) -> None:
    assert files(base, *command.format(root=base / "root").split()) == set()


def test_links_on_the_way_are_followed(base: Path) -> None:
    (base / "other").symlink_to(base / "root")
    (base / "root/link.py").symlink_to("lib/real.py")
    assert files(base, "python3", "other/app.py", directory=".") == {"app.py"}
    # A patch names the file; the link's own name is one that it must not touch in any case.
    assert files(base, "python3", "root/link.py", directory=".") == {"link.py", "lib/real.py"}
    # As it is once patches manage it.
    (base / "store").mkdir()
    (base / "store/app.py").touch()
    (base / "root/app.py").unlink()
    (base / "root/app.py").symlink_to(base / "store/app.py")
    assert files(base, "python3", "app.py", directory="root") == {"app.py"}
    assert files(base, "python3", "app.py", directory="other") == {"app.py"}
    # A tree: the root itself is the link.
    (base / "root").rename(base / "generation")
    (base / "root").symlink_to(base / "generation")
    assert files(base, "python3", "app.py", directory="root") == {"app.py"}
    assert files(base, "generation/bin/run", directory=".") == {"bin/run"}
