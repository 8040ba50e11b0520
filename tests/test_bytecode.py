"""Bytecode: never of another generation, and the library's only once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Serve, wait_for

from asyncsup.patch import bytecode


def run(root: Path, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(root / "main.py")],
        env={"PYTHONPYCACHEPREFIX": str(cache)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def compiled(folder: Path) -> set[str]:
    """The modules whose bytecode is below a folder; links are not followed."""
    return {name.split(".")[0] for _, _, names in os.walk(folder) for name in names}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "srv" / "app"
    root.mkdir(parents=True)
    (root / "main.py").write_text("import json, price\nprint(price.VALUE)\n")
    (root / "price.py").write_text("VALUE = 'old'\n")
    (tmp_path / "state").mkdir()
    return root


def test_a_source_of_equal_size_and_time_is_not_mistaken_for_the_one_before(
    root: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    before = (root / "price.py").stat()
    for generation, text in enumerate(("old", "new")):
        (root / "price.py").write_text(f"VALUE = '{text}'\n")
        os.utime(root / "price.py", ns=(before.st_atime_ns, before.st_mtime_ns))
        bytecode.lay_out(state, "web", generation, root)
        for _ in range(2):
            assert run(root, bytecode.prefix(state, "web", generation)) == text
    # The control: one cache for both would have said "new" here.
    (root / "price.py").write_text("VALUE = 'odd'\n")
    os.utime(root / "price.py", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(root, bytecode.prefix(state, "web", 1)) == "new"


def test_the_library_is_compiled_once_for_all_generations_and_targets(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    for target, generation in (("web", 0), ("web", 1), ("api", 0)):
        bytecode.lay_out(state, target, generation, root)
        run(root, bytecode.prefix(state, target, generation))
        assert compiled(bytecode.prefix(state, target, generation)) == {"price"}
    assert "decoder" in compiled(state / "pycache" / ".shared")


def test_a_neighbour_of_the_root_is_shared_and_neither_root_nor_state_is(root: Path, tmp_path: Path) -> None:
    state = root.parent / "state"
    state.mkdir()
    library = root.parent / "venv"
    library.mkdir()
    (library / "neighbour.py").write_text("")
    (state / "inner.py").write_text("")
    (root / "main.py").write_text(
        f"import sys\nsys.path += [{str(library)!r}, {str(state)!r}]\nimport neighbour, inner, price\n"
    )
    bytecode.lay_out(state, "web", 0, root)
    run(root, bytecode.prefix(state, "web", 0))
    assert compiled(bytecode.prefix(state, "web", 0)) == {"inner", "price"}
    shared = compiled(state / "pycache" / ".shared")
    assert "neighbour" in shared
    assert not shared & {"inner", "price", "main"}


def test_a_folder_with_too_much_in_it_is_left_alone(root: Path, tmp_path: Path) -> None:
    for number in range(bytecode.MOST_NEIGHBOURS):
        (root.parent / f"n{number}").mkdir()
    bytecode.lay_out(tmp_path / "state", "web", 0, root)
    mirrored = bytecode.prefix(tmp_path / "state", "web", 0) / root.parent.relative_to("/")
    assert not mirrored.exists() or os.listdir(mirrored) == []  # noqa: PTH208
    assert run(root, bytecode.prefix(tmp_path / "state", "web", 0)) == "old"


def test_discarding_a_generation_leaves_what_is_shared(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    for generation in (0, 1):
        bytecode.lay_out(state, "web", generation, root)
        run(root, bytecode.prefix(state, "web", generation))
    shared = compiled(state / "pycache" / ".shared")
    bytecode.discard(state, "web", 0)
    bytecode.sweep(state, "web", {2})
    assert list((state / "pycache" / "web").iterdir()) == []
    assert compiled(state / "pycache" / ".shared") == shared


def test_a_cache_that_cannot_be_made_stops_nobody(root: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "pycache").write_text("in the way")
    bytecode.lay_out(state, "web", 0, root)
    assert run(root, bytecode.prefix(state, "web", 0)) == "old"


def test_the_instances_of_a_supervisor_share_it(serve: Serve) -> None:
    app = serve.folder / "app"
    app.mkdir()
    (app / "main.py").write_text(
        "import json, price, time\nprint(price.VALUE, flush=True)\ntime.sleep(600)\n"
    )
    (app / "price.py").write_text("VALUE = 'running'\n")
    client = serve.start(
        f'[target.app]\nroot = "app"\ncommand = ["{sys.executable}", "{app}/main.py"]\nmin_uptime = "0s"\n'
    )
    home = serve.folder / ".asyncsup/pycache"
    wait_for(lambda: "price" in compiled(home / "app" / "0"), "the program's own bytecode")
    assert compiled(home / "app") == {"price"}
    assert "decoder" in compiled(home / ".shared")
    client.close()
