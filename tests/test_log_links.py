"""Where a target's user may write to the folder of its output, he decides about no other file by that."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Serve, wait_for

from asyncsup.compressor import Compressor
from asyncsup.logfile import RotatingFile
from asyncsup.logreader import LogReader
from asyncsup.safe_open import safe_open

pytestmark = pytest.mark.anyio
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

SECRET = b"what only root may read\n"


def give_away(*paths: Path) -> None:
    for path in paths:
        os.lchown(path, pwd.getpwnam("nobody").pw_uid, -1)


class Place:
    """A folder that belongs to nobody, and a file beside it that does not."""

    def __init__(self, folder: Path) -> None:
        self.app = folder / "app"
        self.app.mkdir()
        give_away(self.app)
        self.log = self.app / "out.log"
        self.secret = folder / "secret"
        self.secret.write_bytes(SECRET)
        self.secret.chmod(0o600)

    def link(self, name: str = "out.log", to: Path | None = None) -> None:
        """As nobody would make it."""
        (self.app / name).symlink_to(to or self.secret)
        give_away(self.app / name)

    def file(
        self, path: Path | None = None, *, max_files: int = 3, max_age: float | None = None
    ) -> RotatingFile:
        return RotatingFile(path or self.log, max_size=1000, max_files=max_files, max_age=max_age)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    assert place.secret.read_bytes() == SECRET


def text_of(file: RotatingFile) -> str:
    reader = LogReader(file, instance="web:0", stream="stdout")
    return reader.read(reader.tail(100)).text


@root_only
def test_a_target_reaches_no_file_of_roots_by_the_path_of_its_output(serve: Serve) -> None:
    serve.folder.chmod(0o711)
    place = Place(serve.folder)
    place.link()
    client = serve.start(
        '[target.app]\ncommand = ["sh", "-c", "echo written; exec sleep 1000"]\n'
        'user = "nobody"\nlog.stdout = "app/out.log"\n'
    )
    wait_for(lambda: "output is lost" in serve.errors(), "the refusal")
    assert "'out.log' is a link that others can have put there" in serve.errors()
    answer = client.call("logs", name="app", lines=100)
    assert "root" not in str(answer)
    assert place.secret.read_bytes() == SECRET
    assert client.call("status")["targets"][0]["instances"][0]["state"] in {"starting", "running"}
    client.close()


@root_only
def test_no_link_is_followed_that_others_can_have_put_there(place: Place) -> None:
    place.link()
    with pytest.raises(OSError, match="is a link"):
        place.file().write(b"x\n")
    assert text_of(place.file()) == ""
    place.log.unlink()
    # One of root's that was there already, under another name.
    place.log.symlink_to(place.secret)
    with pytest.raises(OSError, match="is a link"):
        place.file().write(b"x\n")
    assert text_of(place.file()) == ""


@root_only
def test_no_folder_on_the_way_is_a_link_that_others_can_have_put_there(place: Place) -> None:
    place.link("logs", place.secret.parent)
    with pytest.raises(OSError, match="'logs' is a link"):
        place.file(place.app / "logs" / "new").write(b"x\n")
    with pytest.raises(OSError, match="'logs' is a link"):
        place.file(place.app / "logs" / "folder" / "new").write(b"x\n")
    assert text_of(place.file(place.app / "logs" / "secret")) == ""
    assert {path.name for path in place.secret.parent.iterdir()} == {"app", "secret"}


@root_only
def test_nor_is_a_rotated_file_read_or_compressed_that_is_a_link(place: Place) -> None:
    place.log.write_bytes(b"mine\n")
    place.link("out.log.1")
    place.link("out.log.2.gz")
    assert text_of(place.file()) == "mine\n"
    compressor = Compressor()
    file = RotatingFile(place.log, max_size=1000, max_files=4, compress=compressor.submit)
    compressor.submit(file)
    compressor.close()
    assert {path.name for path in place.app.iterdir()} == {"out.log", "out.log.1", "out.log.2.gz"}


@root_only
def test_a_second_name_of_somebody_elses_file_is_none_of_ours(place: Place) -> None:
    place.log.hardlink_to(place.secret)
    with pytest.raises(OSError, match="several names"):
        place.file().write(b"x\n")
    assert text_of(place.file()) == ""


@root_only
async def test_what_is_not_ours_to_open_has_no_age(place: Place) -> None:
    place.link()
    file = place.file(max_age=3600.0)
    file.take_up()
    assert file._timer is None


def test_links_of_our_own_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "logs").symlink_to("disk")
    (tmp_path / "disk" / "web.log").symlink_to(tmp_path / "disk" / "other.log")
    file = RotatingFile(tmp_path / "logs" / "sub" / ".." / "web.log", max_size=1000, max_files=3)
    with pytest.raises(FileNotFoundError):
        safe_open(file.path, os.O_RDONLY)
    file.write(b"one\n")
    assert (tmp_path / "disk" / "other.log").read_bytes() == b"one\n"
    assert text_of(file) == "one\n"
    file.close()


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match="symbolic links"):
        safe_open(tmp_path / "one", os.O_RDONLY)
    for odd in (tmp_path, Path("/")):
        with pytest.raises(IsADirectoryError):
            safe_open(odd, os.O_WRONLY)


async def test_what_somebody_has_open_is_written_to_and_never_renamed(tmp_path: Path) -> None:
    """As ``/dev/stdout`` of ``serve >file``."""
    elsewhere = tmp_path / "file"
    link = tmp_path / "stdout"
    with elsewhere.open("ab", buffering=0) as opened:
        link.symlink_to(f"/proc/self/fd/{opened.fileno()}")
        file = RotatingFile(link, max_size=20, max_files=3, max_age=0.01)
        file.take_up()
        assert file._timer is None
        file.write(b"0123456789\n")
        opened.write(b"somebody else's\n")
        file.write(b"0123456789\n")
        assert (file.room > 1 << 40, file.spliceable, file.place) == (True, False, (0, 0, 0))
    assert elsewhere.read_bytes() == b"0123456789\nsomebody else's\n0123456789\n"
    assert text_of(file) == ""
    assert stat.S_ISLNK(link.lstat().st_mode)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "stdout"}
    file.close()


def test_the_output_of_serve_itself_may_be_a_file(serve: Serve) -> None:
    link = serve.folder / "stdout"
    link.symlink_to("/proc/self/fd/1")
    client = serve.start(
        '[supervisor]\nlog_level = "error"\n[target.app]\n'
        'command = ["sh", "-c", "seq -f %0100g 3000; echo all; exec sleep 1000"]\n'
        'log.stdout = "stdout"\nlog.max_size = "64KiB"\n'
    )
    wait_for(lambda: serve.errors().endswith("all\n"), "all of it")
    assert serve.errors() == "".join(f"{number:0100}\n" for number in range(1, 3001)) + "all\n"
    assert [path.name for path in serve.folder.glob("stdout*")] == ["stdout"]
    assert link.is_symlink()
    client.close()


def test_many_write_whole_lines_into_the_output_of_serve_each_with_its_name(serve: Serve) -> None:
    """As in a container: two streams of several instances of several targets."""
    client = serve.start(
        '[supervisor]\nlog_level = "error"\n[defaults]\nrestart = "never"\nmin_uptime = 0\n'
        'log = { stdout = "/dev/stdout", stderr = "/dev/stdout", format = "prefix" }\n'
        'command = ["sh", "-c", "seq -f %010g 3000; seq -f %010g 3001 6000 >&2"]\n'
        "[target.a]\ninstances = 2\n[target.b]\n"
    )
    wait_for(lambda: serve.errors().count("\n") >= 3 * 6000, "all of it", every=0.1)
    client.close()
    lines = serve.errors().splitlines()
    assert len(lines) == 3 * 6000
    for name in ("a:0", "a:1", "b:0"):
        mine = [int(line.removeprefix(f"{name} | ")) for line in lines if line.startswith(f"{name} | ")]
        # Each stream in its order; nothing is said about that of the two.
        assert [number for number in mine if number <= 3000] == list(range(1, 3001))
        assert [number for number in mine if number > 3000] == list(range(3001, 6001))
