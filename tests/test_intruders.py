"""Who may write to the inbox, to a package, or beside it, is not who decides: races, links, floods."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import zip_forge
from conftest import Asked, Serve, wait_for
from ssh_kit import key
from test_bad_inputs import Site, running
from zip_forge import FILES, Part, forge, manifest_part, native

from asyncsup.client import ControlClient
from asyncsup.config import PatchLimits, parse_config
from asyncsup.errors import (
    PatchError,
    PatchMalformedError,
    PatchRefusedError,
    RemoteError,
    RequestError,
    StateError,
    UsageError,
)
from asyncsup.events import EventStream
from asyncsup.patch import uploads
from asyncsup.patch.arrivals import Arrivals
from asyncsup.patch.checksum import has_checksum, read_checksum
from asyncsup.patch.clock import SeenClock
from asyncsup.patch.inbox import Inbox
from asyncsup.patch.intake import Intake, Source
from asyncsup.patch.package import Package, open_package
from asyncsup.patch.patchable import Patchable
from asyncsup.patch.signing import sign_package
from asyncsup.patch.store import Store
from asyncsup.patch.uploads import Uploads
from asyncsup.patch.wish import Wish

VALID = native(*FILES)
LONG_NAME = "x" * 251 + ".zip"
"""As long as a name can be: there is no room for an ending behind it."""


# --- the checksum beside a package --------------------------------------------------------------------------


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def locked(path: Path) -> None:
    path.write_text("0" * 64)
    path.chmod(0)
    if os.access(path, os.R_OK):
        # Root reads everything but what the system itself refuses.
        path.unlink()
        path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    "make", [huge, os.mkfifo, Path.mkdir, locked, lambda path: path.symlink_to(path.name)],
    ids=["a terabyte", "pipe", "folder", "not readable", "loop"],
)  # fmt: skip
def test_a_checksum_file_that_is_none_is_an_error_and_costs_nothing(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "p.zip.sha256")
    with pytest.raises(UsageError) as caught:
        read_checksum(tmp_path / "p.zip")
    assert caught.value.error_code == "usage.sha256"


def test_a_package_whose_name_has_no_room_for_an_ending_has_no_checksum(tmp_path: Path) -> None:
    assert read_checksum(tmp_path / LONG_NAME) is None
    assert not has_checksum(tmp_path / LONG_NAME)


def test_two_checksums_of_one_name_are_none(tmp_path: Path) -> None:
    listed = tmp_path / "p.zip.sha256"
    one, other = "1" * 64, "2" * 64
    listed.write_text(f"{one}  p.zip\n{other}  old/p.zip\n")
    with pytest.raises(UsageError, match="several"):
        read_checksum(tmp_path / "p.zip")
    listed.write_text(f"{one}  p.zip\n{one.upper()} *old/p.zip\r\n{other}  q.zip\n")
    assert read_checksum(tmp_path / "p.zip") == one


@pytest.mark.parametrize("end", ["\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_line_ends_where_sha256sum_ends_it(tmp_path: Path, end: str) -> None:
    """A file with such a name, dropped beside the good one, must not speak for it in `sha256sum *`."""
    (tmp_path / "p.zip").write_bytes(VALID)
    (tmp_path / f"a{end}{'0' * 64}  p.zip").write_bytes(b"dropped by somebody")
    names = sorted(path.name for path in tmp_path.iterdir())
    listed = subprocess.run(["sha256sum", "--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "p.zip.sha256").write_bytes(listed)
    assert read_checksum(tmp_path / "p.zip") == hashlib.sha256(VALID).hexdigest()
    subprocess.run(["sha256sum", "--check", "--status", "p.zip.sha256"], cwd=tmp_path, check=True)


# --- a package that changes after it was checked ------------------------------------------------------------

GOOD_BUILD, EVIL_BUILD = 300, 999


def package_of(build: int) -> bytes:
    # Stored: equally long, and the manifest is where it is, whatever it says.
    return forge(replace(manifest_part(*FILES, build=build), method=0), *FILES)


def write_back_and_forth(path: Path, contents: list[bytes], stop: threading.Event) -> None:
    """Through a memory mapping that is dirty already: no time stamp tells of it."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        differing = [at for at, (a, b) in enumerate(zip(*contents, strict=True)) if a != b]
        start, end = differing[0], differing[-1] + 1
        turn = 0
        while not stop.is_set():
            turn ^= 1
            view[start:end] = contents[turn][start:end]


def accepted_builds(
    path: Path, digest: str, private_copies: Path | None, *, until: int, tries: int
) -> set[int]:
    """The builds of what was accepted under a digest, while somebody writes into the file."""
    builds: set[int] = set()
    for _ in range(tries):
        with (
            contextlib.suppress(PatchMalformedError),
            open_package(path, sha256=digest, private_copies=private_copies) as package,
        ):
            builds.add(package.manifest.build)
        if until in builds:
            break
    return builds


def test_a_package_that_others_write_to_is_read_from_a_copy_of_what_was_checked(tmp_path: Path) -> None:
    """The operator gives the SHA-256 of the good one; the file changes after it was computed."""
    path, private = tmp_path / "p.zip", tmp_path / "private"
    private.mkdir(mode=0o700)
    good, evil = package_of(GOOD_BUILD), package_of(EVIL_BUILD)
    assert len(good) == len(evil)
    digest = hashlib.sha256(good).hexdigest()
    path.write_bytes(good)
    path.chmod(0o666)
    stop = threading.Event()
    writer = threading.Thread(target=write_back_and_forth, args=(path, [good, evil], stop))
    writer.start()
    try:
        # Without the copy the attack works, so that this test can fail.
        control = accepted_builds(path, digest, None, until=EVIL_BUILD, tries=5000)
        builds = accepted_builds(path, digest, private, until=EVIL_BUILD, tries=200)
    finally:
        stop.set()
        writer.join()
    assert EVIL_BUILD in control, "the control found nothing; the test proves nothing"
    assert builds == {GOOD_BUILD}
    assert not list(private.iterdir())


def test_only_what_others_may_write_to_is_copied(tmp_path: Path) -> None:
    """The operator's own package is read where it lies: there need be no room for a copy, nor a place."""
    path = tmp_path / "p.zip"
    path.write_bytes(VALID)
    path.chmod(0o644)
    open_package(path, private_copies=tmp_path / "missing").close()
    for mode in (0o664, 0o646):
        path.chmod(mode)
        with pytest.raises(PatchRefusedError):
            open_package(path, private_copies=tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_of_another_user_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "p.zip"
    path.write_bytes(VALID)
    os.chown(path, 1000, 1000)
    with open_package(path, private_copies=tmp_path) as package:
        path.write_bytes(VALID.replace(b"stored as it is", b"changed by owner"))
        package.verify()


def test_a_copy_that_finds_no_room_is_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "p.zip"
    path.write_bytes(native(Part(name="files/zeros", data=bytes(2 << 20), method=0)))
    path.chmod(0o666)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(PatchRefusedError) as caught:
            open_package(path, private_copies=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (caught.value.error_code, caught.value.exit_status) == ("gate.space", 20)
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors
    assert [found.name for found in tmp_path.iterdir()] == ["p.zip"]


def test_a_link_is_followed_only_where_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "p.zip").write_bytes(VALID)
    (tmp_path / "link.zip").symlink_to("p.zip")
    open_package(tmp_path / "link.zip").close()
    with pytest.raises(PatchMalformedError) as caught:
        open_package(tmp_path / "link.zip", follow=False)
    assert caught.value.error_code == "zip.unreadable"


# --- the inbox ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running("none") as site:
        yield site


_builds = itertools.count(300)


def package(**keys: Any) -> bytes:
    """One that brings a file and a build that the site has not yet."""
    build = next(_builds)
    return native(Part(name=f"files/{build}.txt", data=b"brought"), build=build, **keys)


def clear(inbox: Path) -> None:
    for path in [*inbox.iterdir(), *inbox.glob("*/*")]:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    for name in ("applied", "rejected"):
        (inbox / name).mkdir(exist_ok=True)


@pytest.fixture
def inbox(site: Site) -> Iterator[Path]:
    clear(site.serve.inbox)
    yield site.serve.inbox
    clear(site.serve.inbox)


def test_odd_names_in_the_inbox_keep_nobody_from_seeing_the_others(site: Site, inbox: Path) -> None:
    odd = {
        LONG_NAME, "\x1b[2J\x1b[31m.zip", "new\nline.zip", "\u202egnp.zip", " .zip", "-rf.zip", "%s{0}.zip",
    }  # fmt: skip
    for name in odd:
        (inbox / name).write_bytes(VALID)
    Path(os.fsdecode(os.fsencode(inbox) + b"/\xff.zip")).write_bytes(VALID)
    (inbox / "link.zip").symlink_to("/etc/passwd")
    os.mkfifo(inbox / "pipe.zip")
    huge(inbox / "sparse.zip")
    (inbox / "good.zip").write_bytes(VALID)
    found = {entry["file"]: entry["state"] for entry in site.client.call("patch.list")["inbox"]}
    assert found == dict.fromkeys(odd | {"good.zip"}, "complete") | {"sparse.zip": "incomplete"}
    shown = subprocess.run(
        [sys.executable, "-m", "asyncsup", "-c", str(site.serve.config), "patch", "list"],
        capture_output=True, check=True, stdin=subprocess.DEVNULL,
    ).stdout  # fmt: skip
    assert b"good.zip" in shown
    assert b"\x1b" not in shown
    assert "\u202e".encode() not in shown


def test_a_package_with_the_longest_name_is_filed_with_its_report(site: Site, inbox: Path) -> None:
    (inbox / LONG_NAME).write_bytes(package())
    assert site.client.call("patch.apply", name=LONG_NAME)["verdict"] == "committed"
    report, filed = sorted((inbox / "applied").iterdir(), key=lambda path: path.suffix)
    assert filed.name.startswith("xxx")
    assert report.name == f"{filed.name}.json"
    assert not list(inbox.glob("*.zip"))


def test_a_package_with_the_longest_name_does_not_stop_the_automatic_ones() -> None:
    with running("none", "auto = true") as site:
        (site.serve.inbox / LONG_NAME).write_bytes(native(*FILES, targets=["elsewhere"]))
        (site.folder / "p.tmp").write_bytes(native(*FILES))
        (site.folder / "p.tmp").rename(site.serve.inbox / "p.zip")
        wait_for((site.serve.inbox / "applied/p.zip.json").exists, "the package to be applied")


@pytest.mark.anyio
async def test_a_package_that_fails_as_nobody_foresaw_is_alone_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may run out wherever it likes: the task group that would be torn down runs everything."""

    def opened(path: Path, **options: Any) -> Package:
        if path.name == "bad.zip":
            raise MemoryError
        return open_package(path, **options)

    applied: list[str] = []
    both = anyio.Event()

    async def apply(source: Source, wish: Wish) -> None:
        applied.append(source.path.name)
        if len(applied) == 2:
            both.set()
        raise MemoryError

    monkeypatch.setattr("asyncsup.patch.intake.open_package", opened)
    config = parse_config('[patch]\ntrust = "none"\n', path=tmp_path / "asyncsup.toml")
    inbox = Inbox(config.patch.inbox, EventStream(lambda topic, frame: None))
    sent = Uploads(tmp_path / "uploads", lambda: config.patch.limits)
    intake = Intake(lambda: config.patch, inbox, sent, SeenClock(0.0))
    nobody: Any = SimpleNamespace(targets={})
    none_under_way: Any = SimpleNamespace(has_package=lambda name: False)
    arrivals = Arrivals(inbox, intake, Patchable(nobody), none_under_way, apply)
    for name in ("bad.zip", "first.zip", "second.zip"):
        (inbox.folder / name).write_bytes(VALID)
    found = {entry["file"]: entry["state"] for entry in (await arrivals.listing())["inbox"]}
    assert found == {"bad.zip": "malformed", "first.zip": "complete", "second.zip": "complete"}
    async with anyio.create_task_group() as tasks:
        await tasks.start(inbox.watch)
        tasks.start_soon(arrivals.apply_all)
        with anyio.fail_after(100):
            await both.wait()
        tasks.cancel_scope.cancel()
    assert sorted(applied) == ["first.zip", "second.zip"]


@pytest.mark.parametrize("what", ["folder", "report", "package"])
def test_nothing_is_filed_through_a_link(site: Site, inbox: Path, tmp_path: Path, what: str) -> None:
    """Who may write to the inbox may put links where reports go; root would follow them anywhere."""
    applied = inbox / "applied"
    if what == "folder":
        applied.rmdir()
        applied.symlink_to(tmp_path)
    else:
        (applied / ("p.zip.json" if what == "report" else "p.zip")).symlink_to(tmp_path / "created")
    (inbox / "p.zip").write_bytes(package())
    assert site.client.call("patch.apply", name="p.zip")["verdict"] == "committed"
    assert not list(tmp_path.iterdir())
    if what == "folder":
        assert (inbox / "p.zip").exists()
        assert "stays where it is" in site.serve.errors()
    else:
        assert json.loads((applied / "p-2.zip.json").read_text())["verdict"] == "committed"
        assert (applied / "p-2.zip").is_file()


def test_a_link_in_the_inbox_is_no_package_even_by_its_path(site: Site, inbox: Path, tmp_path: Path) -> None:
    (tmp_path / "p.zip").write_bytes(package())
    (inbox / "p.zip").symlink_to(tmp_path / "p.zip")
    with pytest.raises(RemoteError) as caught:
        site.client.call("patch.apply", path=str(inbox / "p.zip"))
    assert caught.value.error_code == "zip.unreadable"
    assert site.client.call("patch.apply", path=str(tmp_path / "p.zip"))["verdict"] == "committed"


def test_a_new_package_in_the_inode_of_the_old_one_is_another_package(site: Site, inbox: Path) -> None:
    older, newer = package(probation=2.0), package()
    root = site.folder / "pricer"
    before = set(root.iterdir())
    (inbox / "p.zip").write_bytes(older)
    outcome: list[Any] = []

    def apply() -> None:
        with ControlClient(site.serve.endpoint) as other:
            outcome.append(other.call("patch.apply", name="p.zip"))

    thread = threading.Thread(target=apply)
    thread.start()
    try:
        wait_for(lambda: set(root.iterdir()) - before, "the file that it brings")
        # The same inode, for certain.
        (inbox / "p.zip").write_bytes(newer)
    finally:
        thread.join(100)
    assert outcome[0]["verdict"] == "committed"
    assert (inbox / "p.zip").read_bytes() == newer
    assert site.client.call("patch.apply", name="p.zip")["verdict"] == "committed"


@pytest.mark.parametrize(
    "path", ["/" + "x" * 300, "/proc/1/fd/0/x", "/dev/full", "/", "/a\0b", "/" + "d/" * 3000]
)
def test_a_path_that_cannot_be_one_is_not_found(site: Site, path: str) -> None:
    with pytest.raises(RemoteError) as caught:
        site.client.call("patch.plan", path=path)
    assert (caught.value.error_code, caught.value.remote_exit_status) == ("patch.not_found", 4)


# --- what decides about patches -----------------------------------------------------------------------------


def test_no_patch_decides_about_the_next_one(serve: Serve) -> None:
    """Everything is in the target's root, as where a program and its configuration have one folder."""
    (serve.folder / "conf.d").mkdir()
    client = serve.start(
        '[supervisor]\nregion = "us-east-1"\nstate_dir = "state"\nruntime_dir = ".asyncsup/run"\n'
        'include = ["conf.d/*.toml"]\n[patch]\ntrust = "none"\n'
        '[target.pricer]\nroot = "."\ncommand = "sleep 1000"\nautostart = false\n'
    )
    before = serve.config.read_bytes()
    for path in ("asyncsup.toml", "conf.d/more.toml", "inbox/next.zip", "state/state.db", "state/x"):
        change = Part(name=f"files/{path}", data=b"evil")
        manifest = manifest_part(files=[zip_forge.change(change, replace=True)])
        (serve.folder / "p.zip").write_bytes(forge(manifest, change))
        with pytest.raises(RemoteError) as caught:
            client.call("patch.apply", path=str(serve.folder / "p.zip"))
        assert caught.value.error_code == "gate.path", path
    assert serve.config.read_bytes() == before
    (serve.folder / "p.zip").write_bytes(VALID)
    assert client.call("patch.apply", path=str(serve.folder / "p.zip"))["verdict"] == "committed"
    client.close()


def test_what_a_configuration_includes_is_guarded_as_soon_as_it_is_taken_up(serve: Serve) -> None:
    main = (
        '[supervisor]\nregion = "us-east-1"\nstate_dir = "state"\nruntime_dir = ".asyncsup/run"\n{}'
        '[patch]\ntrust = "none"\n'
        '[target.pricer]\nroot = "."\ncommand = "sleep 1000"\nautostart = false\n'
    )
    for folder in ("more.d", "conf.d"):
        (serve.folder / folder).mkdir()
    client = serve.start(main.format('include = ["conf.d/*.toml"]\n'))

    def code_of_patch(build: int, path: str) -> str | None:
        change = Part(name=f"files/{path}", data=b"evil")
        package = serve.folder / f"{build}.zip"
        package.write_bytes(forge(manifest_part(build=build, files=[zip_forge.change(change)]), change))
        try:
            client.call("patch.apply", path=str(package))
        except RemoteError as error:
            return error.error_code
        return None

    # What is refused does not end what was guarded: the one in force may be read again.
    assert code_of_patch(400, "managed") is None
    after = main.format('include = ["more.d/*.toml"]\n')
    serve.config.write_text(after.replace('root = "."', 'root = "more.d"'))
    with pytest.raises(RemoteError) as caught:
        client.call("config.apply")
    assert caught.value.error_code == "state.root_changed"
    for build, path in ((401, "conf.d/x.toml"), (402, "more.d/x.toml")):
        assert code_of_patch(build, path) == "gate.path", path
    serve.config.write_text(after)
    client.call("config.apply")
    assert code_of_patch(403, "more.d/x.toml") == "gate.path"
    assert code_of_patch(404, "conf.d/x.toml") is None, "nobody reads it any more"
    client.close()


def test_what_is_guarded_while_a_patch_is_under_way_is_not_changed_by_it(serve: Serve) -> None:
    held = "touch asked; until [ -e go ]; do sleep 0.02; done"
    main = (
        '[supervisor]\nregion = "us-east-1"\nstate_dir = "state"\nruntime_dir = ".asyncsup/run"\n{}'
        '[patch]\ntrust = "none"\n'
        '[target.pricer]\nroot = "."\ncommand = "sleep 1000"\nautostart = false\n'
        f'hooks.pre_patch = ["sh", "-c", "{held}"]\nhooks.timeout = "100s"\n'
    )
    (serve.folder / "conf.d").mkdir()
    included = serve.folder / "conf.d/x.toml"
    included.touch()
    change = Part(name="files/conf.d/x.toml", data=b"evil")
    base = hashlib.sha256(b"").hexdigest()
    changes = [zip_forge.change(change, op="modified", base_sha256=base)]
    package = serve.folder / "p.zip"
    package.write_bytes(forge(manifest_part(build=400, files=changes), change))
    with serve.start(main.format("")) as client:
        asked = Asked(serve.endpoint, "patch.apply", path=str(package))
        wait_for((serve.folder / "asked").exists, "the patch to be staged")
        serve.config.write_text(main.format('include = ["conf.d/*.toml"]\n'))
        client.call("config.apply")
        (serve.folder / "go").touch()
        asked.error("gate.path")
    assert included.read_bytes() == b""


def test_what_the_configuration_in_force_reads_is_guarded_until_another_one_is(serve: Serve) -> None:
    """A target that is being removed takes its time; until then the old configuration is in force."""
    main = (
        '[supervisor]\nregion = "us-east-1"\nstate_dir = "state"\nruntime_dir = ".asyncsup/run"\n{}'
        '[patch]\ntrust = "none"\n'
        '[target.pricer]\nroot = "."\ncommand = "sleep 1000"\nautostart = false\n{}'
    )
    deaf = "trap '' TERM\ntouch deaf\nuntil [ -e go ]; do sleep 0.02; done\n"
    (serve.folder / "deaf.sh").write_text(deaf)
    (serve.folder / "conf.d").mkdir()
    old = '[target.old]\ncommand = "sh deaf.sh"\nstop_timeout = "5m"\n'
    client = serve.start(main.format('include = ["conf.d/*.toml"]\n', old))
    wait_for((serve.folder / "deaf").exists, "the program not to listen")
    serve.config.write_text(main.format("", ""))
    change = Part(name="files/conf.d/x.toml", data=b"evil")
    package = serve.folder / "p.zip"
    package.write_bytes(forge(manifest_part(build=401, files=[zip_forge.change(change)]), change))
    applying = Asked(serve.endpoint, "config.apply")
    wait_for(lambda: client.call("status", names=["old"])["targets"][0]["state"] == "stopping", "the stop")
    with pytest.raises(RemoteError) as caught:
        client.call("patch.apply", path=str(package))
    assert caught.value.error_code == "gate.path"
    (serve.folder / "go").touch()
    applying.result()
    assert client.call("patch.apply", path=str(package))["verdict"] == "committed"
    client.close()


# --- uploads ------------------------------------------------------------------------------------------------


def test_uploads_are_few_small_and_forgotten_when_given_up(tmp_path: Path) -> None:
    taken = Uploads(tmp_path / "uploads", lambda: PatchLimits(package_size=1000))
    assert stat.S_IMODE((tmp_path / "uploads").stat().st_mode) == 0o700
    first = taken.take(None, 0, bytes(1000), last=False)["upload"]
    assert taken.take(first, 0, bytes(1000), last=True)["size"] == 1000
    with pytest.raises(PatchMalformedError) as too_large:
        taken.take(first, 1000, b"x", last=True)
    assert too_large.value.error_code == "zip.package_size"
    for _ in range(uploads.SHARES):
        last = taken.take(None, 0, bytes(1000), last=True)["upload"]
    with pytest.raises(PatchError) as full:
        taken.take(None, 0, b"x", last=True)
    assert full.value.error_code == "upload.quota"
    taken.drop(taken.path(last))
    for _ in range(uploads.MOST - uploads.SHARES + 1):
        last = taken.take(None, 0, b"x", last=False)["upload"]
    with pytest.raises(PatchError) as full:
        taken.take(None, 0, b"x", last=True)
    assert full.value.error_code == "upload.quota"
    given_up = time.time() - uploads.IDLE_SECONDS - 1
    for path in (tmp_path / "uploads").iterdir():
        if path.name != last:
            os.utime(path, (given_up, given_up))
    taken.take(None, 0, bytes(1000), last=True)
    assert taken.path(last).exists()
    assert len(list((tmp_path / "uploads").iterdir())) == 2


@pytest.mark.parametrize(
    "upload", ["../../etc/passwd", "/etc/passwd", "", "x" * 16, "a" * 5000, "é" * 16, "\0" * 16]
)
def test_what_is_no_upload_is_none(tmp_path: Path, upload: str) -> None:
    with pytest.raises(RequestError):
        Uploads(tmp_path / "uploads", lambda: PatchLimits(package_size=1000)).path(upload)


# --- the state directory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777, 0o702])
def test_a_state_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    state = tmp_path / "state"
    Store.open(state).close()
    state.chmod(mode)
    with pytest.raises(StateError) as caught:
        Store.open(state)
    assert caught.value.error_code == "state.permissions"
    assert f"chmod go-w {state}" in caught.value.message
    state.chmod(0o755)
    Store.open(state).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_the_state_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    Store.open(state).close()
    os.chown(state, 1000, 1000)
    with pytest.raises(StateError) as caught:
        Store.open(state)
    assert caught.value.error_code == "state.permissions"


def test_what_is_in_the_state_directory_is_for_nobody_else(tmp_path: Path) -> None:
    state = tmp_path / "state"
    before = os.umask(0)
    try:
        Store.open(state).close()
        Store.open(state).close()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [state, *state.iterdir()]}
    finally:
        os.umask(before)
    # Programs of other users read below these three, by names they know.
    readable = {name: modes.pop(name) for name in ("state", "generations", "sets", "persist")}
    assert set(readable.values()) == {0o711}
    assert {name: mode & 0o077 for name, mode in modes.items()} == dict.fromkeys(modes, 0)


def test_nobody_else_can_hold_the_lock_of_a_state_directory(tmp_path: Path) -> None:
    """A lock may be taken by whoever may read the file; an older state directory has it readable for all."""
    state = tmp_path / "state"
    Store.open(state).close()
    (state / "lock").chmod(0o644)
    Store.open(state).close()
    assert stat.S_IMODE((state / "lock").stat().st_mode) == 0o600


# --- signing what somebody else made ------------------------------------------------------------------------


def test_a_signed_package_is_no_set_id_file(tmp_path: Path) -> None:
    """It is a new file of the signer's: with the old one's bits it would run as the signer."""
    path = tmp_path / "p.zip"
    path.write_bytes(VALID)
    path.chmod(0o6755)
    sign_package(path, key=key().private)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
