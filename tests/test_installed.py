"""`patch build --from-generation`: the old side is what a target really has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from conftest import Serve
from store_kit import Bench, apply, benches, seen, write_tree

from asyncsup import cli
from asyncsup.errors import PatchNotFoundError, TargetNotFoundError
from asyncsup.patch.facts import Layout
from asyncsup.patch.installed import Installed, installed

both_layouts = pytest.mark.parametrize("layout", list(Layout))


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    with benches() as make:
        yield make


def contents(there: Installed) -> dict[str, bytes]:
    return {path: source.file.read_bytes() for path, source in there.files.items()}


@both_layouts
def test_a_generation_is_what_programs_saw_in_it(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    state = b.base / "state"
    snapshots = [seen(b.root)]
    with installed(state, "web", None) as there:
        assert (there.generation, contents(there)) == (0, snapshots[0])
        assert there.delivered == frozenset()
    apply(b.store, b.patch(100, modified={"app.json": b"two"}, new={"fresh/n.json": b"n"}))
    snapshots.append(seen(b.root))
    apply(b.store, b.patch(200, modified={"app.json": b"three"}, deleted=["rules/us.json"]))
    snapshots.append(seen(b.root))
    b.put("log.txt", b"the program's own")
    with installed(state, "web", None) as there:
        assert (there.generation, there.build) == (2, 200)
        assert contents(there) == {**snapshots[2], "log.txt": b"the program's own"}
        assert there.delivered == {"app.json", "fresh/n.json"}
        assert there.files["run.sh"].mode == 0o755
        assert there.files["app.json"].mode == 0o644, "patched files have lost their write bits"
    with installed(state, "web", 1) as there:
        left = {} if layout is Layout.TREE else {"log.txt": b"the program's own"}
        assert contents(there) == {**snapshots[1], **left}


@both_layouts
def test_a_generation_in_use_is_not_pruned(layout: Layout, bench: Callable[..., Bench]) -> None:
    b = bench(layout)
    for build in (100, 200, 300):
        apply(b.store, b.patch(build, modified={"app.json": str(build).encode()}))
    with installed(b.base / "state", "web", 2) as there:
        assert b.store.prune("web", 1) == [0, 1] or layout is Layout.TREE
        assert there.files["app.json"].file.read_bytes() == b"200"
    with pytest.raises(PatchNotFoundError) as caught, installed(b.base / "state", "web", 0):
        pass
    assert "no generation 0" in caught.value.message
    with pytest.raises(TargetNotFoundError), installed(b.base / "state", "nobody", None):
        pass


def test_what_no_patch_has_brought_is_left_alone(bench: Callable[..., Bench]) -> None:
    b = bench(Layout.OVERLAY)
    apply(b.store, b.patch(100, new={"a.txt": b"a", "b.txt": b"b"}))
    b.put("log.txt", b"log")
    with installed(b.base / "state", "web", None) as there:
        files, foreign = there.without_foreign({"a.txt": 1, "app.json": 1})
        assert foreign == ["log.txt", "rules/eu.json", "rules/us.json", "run.sh"]
        assert set(files) == {"a.txt", "b.txt", "app.json"}


# --- the command --------------------------------------------------------------------------------------------

TARGET = """
[patch]
trust = "none"
probation = 0
[target.web]
command = "sleep 1000"
min_uptime = 0
root = "root"
layout = "{layout}"
"""
WAS = {"app.json": b"one", "rules/eu.json": b"eu", "rules/us.json": b"us", "data.log": b"log"}
WILL_BE = {"app.json": b"two", "rules/eu.json": b"eu", "new.txt": b"new"}


def build(serve: Serve, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any, str]:
    argv = [
        "patch", "build", str(serve.folder / "new"), "-o", str(serve.folder / "p.zip"), "--name", "n",
        "--warm", "-t", "web", "-r", "local", "-c", str(serve.config), "--json", *options,
    ]  # fmt: skip
    status = cli.main(argv)
    captured = capsys.readouterr()
    return status, orjson.loads(captured.out), captured.err


@pytest.mark.parametrize("layout", ["overlay", "tree"])
def test_a_patch_is_built_for_what_is_installed_and_applied_there(
    serve: Serve, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(serve.folder / "root", WAS)
    write_tree(serve.folder / "new", WILL_BE)
    with serve.start(TARGET.format(layout=layout)) as client:
        status, made, notes = build(serve, capsys, "--build", "1", "--from-generation", "current")
        assert status == 0
        files = {file["path"]: file["op"] for file in made["manifest"]["files"]}
        assert files == {"app.json": "modified", "new.txt": "new"}
        assert "2 files" in notes
        assert "data.log, rules/us.json" in notes
        assert client.call("patch.apply", path=made["path"])["verdict"] == "committed"
        (serve.folder / "new/new.txt").unlink()
        (serve.folder / "new/app.json").write_bytes(b"three")
        status, made, _ = build(serve, capsys, "--build", "2", "--from-generation", "current")
        files = {file["path"]: file["op"] for file in made["manifest"]["files"]}
        assert files == {"app.json": "modified", "new.txt": "deleted"}, "a patch has brought it"
        assert client.call("patch.apply", path=made["path"])["verdict"] == "committed"
        assert seen(serve.folder / "root") == {**WAS, "app.json": b"three"}
        (serve.folder / "new/app.json").write_bytes(b"four")
        # Made for the first generation, it does not fit the present one.
        status, made, _ = build(
            serve, capsys, "--build", "3", "--from-generation", "0", "--delete-foreign", "--exclude", "*.log"
        )
        files = {file["path"]: file["op"] for file in made["manifest"]["files"]}
        assert files["rules/us.json"] == "deleted"
        assert "data.log" not in files
        assert client.call("patch.plan", path=made["path"])["verdict"] == "refused"
    # The supervisor need not run.
    assert serve.stop() == 0
    assert build(serve, capsys, "--build", "3", "--from-generation", "2")[0] == 0
    status, answer, _ = build(serve, capsys, "--build", "3", "--from-generation", "9")
    assert (status, answer["error"]["code"]) == (4, "patch.not_found")


def test_from_generation_takes_the_place_of_old(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    serve.write(TARGET.format(layout="tree"))
    for more in (["-t", "api"], ["--prototype"]):
        status, answer, _ = build(serve, capsys, "--build", "1", "--from-generation", "1", *more)
        assert (status, "takes the place of OLD" in answer["error"]["message"]) == (2, True)
    assert build(serve, capsys, "--build", "1", "--from-generation", "last")[0] == 2
