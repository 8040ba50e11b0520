"""Every bad input is refused with its code and leaves no trace; every good one stays accepted.

The table is `hostile_packages.CASES`. What cannot be a package is in `hostile_packages.ELSEWHERE`, and what
has no meaning here in `MEANINGLESS`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
import zip_forge
from conftest import Serve
from hostile_packages import (
    ARCHIVES,
    BUILD,
    CASES,
    DELTAS,
    ELSEWHERE,
    GATES,
    LEGACY,
    MANIFESTS,
    MEANINGLESS,
    REGION,
    ROOT,
    SIGNATURES,
    SIGNED,
    SIGNERS,
    UNSIGNED,
    Case,
    Pack,
)
from requirements import require_program
from ssh_kit import key
from zip_forge import FILES, JOB, NOTE, extra, folder, streamed

from asyncsup.client import ControlClient
from asyncsup.errors import PatchMalformedError, RemoteError
from asyncsup.patch.archive import scan
from asyncsup.patch.package import open_package
from asyncsup.patch.signing import sign_package

ROWS: Final = {
    *(f"zip-{number:02}" for number in range(1, 55)),
    *(f"M{number}" for number in range(1, 27)),
    *(f"T{number}" for number in range(1, 10)),
    *(f"L{number}" for number in range(1, 8)),
}


def by_row(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in cases])


_made: dict[tuple[str, Pack], bytes] = {}


def made(case: Case, pack: Pack) -> bytes:
    """The package; some take a while to make."""
    if (case.id, pack) not in _made:
        _made[case.id, pack] = case.make(pack)
    return _made[case.id, pack]


def picture(folder: Path, *without: str) -> dict[str, Any]:
    """Everything below a folder that somebody could have created, changed or removed."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if str(Path(parent, name).relative_to(folder)) not in without]
        for name in (*folders, *files):
            path = Path(parent, name)
            where = str(path.relative_to(folder))
            if where in without:
                continue
            status = path.lstat()
            content: Any = None
            if path.is_symlink():
                content = str(path.readlink())
            elif stat.S_ISREG(status.st_mode):
                content = (path.read_bytes(), status.st_mtime_ns)
            found[where] = (status.st_mode, status.st_ino, content)
    return found


# --- the table ----------------------------------------------------------------------------------------------


def test_every_row_of_the_note_has_a_case_or_says_why_not() -> None:
    shown = {case.row for case in CASES}
    assert shown | set(ELSEWHERE) | set(MEANINGLESS) >= ROWS
    assert not (shown | set(ELSEWHERE)) & set(MEANINGLESS)
    assert all(MEANINGLESS.values())
    assert all(re.fullmatch(r"(zip|T)-more", row) for row in shown - ROWS)
    assert len({case.id for case in CASES}) == len(CASES)


def test_rows_that_are_shown_elsewhere_are() -> None:
    for row, (why, tests) in ELSEWHERE.items():
        assert why, row
        assert tests, row
        for test in tests:
            assert is_a_test(test), f"{row}: there is no {test}"


def is_a_test(reference: str) -> bool:
    """Whether ``MODULE.FUNCTION`` is a test of this suite."""
    module, _, name = reference.partition(".")
    path = Path(__file__).with_name(f"{module}.py")
    if not path.exists():
        return False
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_what_is_accepted_although_the_note_refuses_it_says_why() -> None:
    for case in CASES:
        assert case.code or case.note or case.row in {"M17", "L6", "L7"} or case is DELTAS[0], case.id


# --- as a library: the package alone ------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_created(*folders: Path) -> Iterator[None]:
    before = [picture(folder) for folder in folders]
    yield
    assert [picture(folder) for folder in folders] == before


def read(path: Path) -> dict[str, bytes]:
    """Open a package and take everything out, as staging does; what is taken out, by path."""
    contents = {}
    with open_package(path) as package:
        package.verify()
        for change in package.manifest.files:
            if change.sha256 is not None:
                with tempfile.TemporaryFile(buffering=0) as out:
                    package.extract(change, out.fileno())
                    out.seek(0)
                    contents[change.path] = out.read()
    return contents


def of_package(case: Case) -> bool:
    """Whether the package itself is at fault, whatever it is applied to."""
    return not case.code.startswith(("gate.", "trust.", "digest.crc32"))


@by_row(*ARCHIVES, *MANIFESTS, *GATES, *LEGACY)
def test_a_package_is_refused_with_its_code_and_leaves_no_trace(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox = tmp_path / "deeper" / "inbox"
    inbox.mkdir(parents=True)
    (inbox / "patch.zip").write_bytes(made(case, SIGNED))
    monkeypatch.chdir(inbox)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deeper"))
    with nothing_created(tmp_path):
        if case.code and of_package(case):
            with pytest.raises(PatchMalformedError) as caught:
                read(inbox / "patch.zip")
            assert caught.value.error_code == case.code, caught.value.message
            assert caught.value.exit_status == 21
            assert caught.value.message.startswith("patch.zip: ")
            assert caught.value.message.isprintable()
        else:
            read(inbox / "patch.zip")


BOOKS: Final = (".asyncsup/state.db", ".asyncsup/journal")
"""What is written to in order to say what was attempted, and what is under way."""

IN_CONTENT: Final = {"zip-30", "zip-45", "zip-46", "zip-52"}


@by_row(*(case for case in ARCHIVES if case.code and case.row not in IN_CONTENT))
def test_structure_is_refused_before_anything_is_inflated(case: Case) -> None:
    """The scan alone refuses it: no entry is read, so none can have been extracted."""
    data = made(case, UNSIGNED)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(PatchMalformedError) as caught:
            scan(file.fileno(), len(data))
    assert caught.value.error_code == case.code


# --- through a supervisor -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Site:
    """A supervisor with targets, and everything around it that must stay as it is."""

    serve: Serve
    client: ControlClient

    @property
    def folder(self) -> Path:
        return self.serve.folder

    def submit(self, data: bytes, method: str = "patch.apply", **asked: Any) -> Any:
        """Give a package from outside of the site to the supervisor."""
        with tempfile.TemporaryDirectory(prefix="as-from-") as outside:
            path = Path(outside) / "patch.zip"
            path.write_bytes(data)
            return self.client.call(method, path=str(path), **asked)

    def picture(self) -> dict[str, Any]:
        """The whole site but for what is written down of every attempt: database, journal and log."""
        whole = picture(self.folder, ".asyncsup/run", "serve.err")
        return {path: what for path, what in whole.items() if not path.startswith(BOOKS)}


def make_site(folder: Path, trust: str, patch: str) -> Serve:
    serve = Serve(folder / "site")
    for name in ("pricer", "cold-only"):
        root = serve.folder / name
        for path, content in ROOT.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        (root / "linked").symlink_to("real")
    lines = (f'{name}@example.com namespaces="asyncsup-patch" {key(name).line}' for name in SIGNERS)
    (serve.folder / "signers").write_text("\n".join(lines) + "\n")
    target = f'command = "sleep 3600"\nbuild = {BUILD}\nprotocol = "none"\n'
    serve.write(
        f'[supervisor]\nregion = "{REGION}"\n[patch]\ntrust = "{trust}"\nallowed_signers = "signers"\n'
        f"signatures_required = {len(SIGNERS)}\nprobation = 0\n{patch}\n"
        f'[target.pricer]\nroot = "pricer"\n{target}'
        f'[target.cold-only]\nroot = "cold-only"\n{target}patch = {{ allow = ["cold"] }}\n'
    )
    return serve


@contextlib.contextmanager
def running(trust: str, patch: str = "") -> Iterator[Site]:
    """A site of its own, until the block ends; `patch` are more settings of `[patch]`."""
    # Short: the path of a socket has little room.
    folder = Path(tempfile.mkdtemp(prefix="as-"))
    serve = make_site(folder, trust, patch)
    try:
        with serve.start() as client:
            # Each start leaves its traces: links to bytecode, for example.
            client.call("wait", {"names": ["all"], "for": "ready", "timeout": 60})
            yield Site(serve=serve, client=client)
    finally:
        if serve.process is not None:
            serve.stop()
        errors = serve.errors()
        shutil.rmtree(folder)
    assert "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def strict() -> Iterator[Site]:
    """Both of `SIGNERS` have to sign."""
    with running("required") as site:
        yield site


@pytest.fixture(scope="module")
def lenient() -> Iterator[Site]:
    """Whoever knows the digest may patch."""
    with running("digest") as site:
        yield site


def first_of_each_row(*cases: Case) -> list[Case]:
    return list({case.row: case for case in reversed(cases)}.values())[::-1]


def foretold(site: Site, data: bytes, **asked: Any) -> tuple[str, int, str]:
    """What a plan says that an apply would end with: code, exit status and message."""
    try:
        plan = site.submit(data, "patch.plan", **asked)
    except RemoteError as error:  # no package at all, or for nobody here: there is nothing to plan
        return error.error_code, error.remote_exit_status, error.message
    assert (plan["verdict"], plan["steps"]) == ("refused", [])
    closed = [target["refused"]["code"] for target in plan["targets"] if target["refused"]]
    assert plan["code"] in closed
    return plan["code"], plan["exit_status"], plan["reason"]


def refused(site: Site, case: Case, data: bytes, **asked: Any) -> None:
    """The supervisor says what is wrong, beforehand as well, and nothing is different afterwards."""
    before = site.picture()
    if case.code:
        told = foretold(site, data, **{**asked, **case.asked})
        assert site.picture() == before
        with pytest.raises(RemoteError) as caught:
            site.submit(data, **{**asked, **case.asked})
        assert caught.value.error_code == case.code, caught.value.message
        assert told == (caught.value.error_code, caught.value.remote_exit_status, caught.value.message)
        assert caught.value.remote_exit_status == (20 if case.code.startswith("gate.") else 21)
    else:
        plan = site.submit(data, "patch.plan", **asked)
        assert plan == plan | {"verdict": "apply"} | case.plan
    assert site.picture() == before


@by_row(*first_of_each_row(*ARCHIVES), *MANIFESTS, *GATES, *DELTAS, *SIGNATURES)
def test_a_supervisor_that_wants_signatures_refuses_it_and_touches_nothing(case: Case, strict: Site) -> None:
    refused(strict, case, made(case, SIGNED))


@by_row(*first_of_each_row(*ARCHIVES), *LEGACY)
def test_a_supervisor_that_wants_a_digest_refuses_it_and_touches_nothing(case: Case, lenient: Site) -> None:
    data = made(case, UNSIGNED)
    asked: dict[str, Any] = {"target": "pricer"} if case in LEGACY else {}
    if "crc32" not in case.asked:
        asked["sha256"] = hashlib.sha256(data).hexdigest()
    refused(lenient, case, data, **asked)


@by_row(
    *(
        case
        for case in first_of_each_row(*CASES)
        if case.row in {"zip-01", "zip-20", "zip-30", "zip-33", "zip-44", "M2", "M8", "M13", "M16", "T2"}
    )
)
def test_it_is_put_aside_with_a_report_when_it_came_into_the_inbox(case: Case, strict: Site) -> None:
    before, inbox = strict.picture(), strict.serve.inbox
    (inbox / "patch.zip").write_bytes(made(case, SIGNED))
    with pytest.raises(RemoteError) as caught:
        strict.client.call("patch.apply", name="patch.zip")
    assert caught.value.error_code == case.code
    aside = inbox / "rejected"
    assert sorted(path.name for path in aside.iterdir()) == ["patch.zip", "patch.zip.json"]
    report = json.loads((aside / "patch.zip.json").read_text())
    assert (report["code"], report["verdict"]) == (case.code, "refused")
    assert (aside / "patch.zip").read_bytes() == made(case, SIGNED)
    for path in aside.iterdir():
        path.unlink()
    assert strict.picture() == before


def test_without_a_digest_or_with_a_wrong_one_it_is_refused_beforehand_as_well(lenient: Site) -> None:
    data, before = UNSIGNED.valid, lenient.picture()
    elsewhere = zip_forge.forge(zip_forge.manifest_part(*FILES, targets=["nobody"]), *FILES)
    for package, asked, code in (
        (data, {}, "trust.digest_missing"),
        (data, {"sha256": "0" * 64}, "digest.sha256"),
        # What is not to be trusted is not asked where it wants to go.
        (elsewhere, {}, "trust.digest_missing"),
    ):
        told = foretold(lenient, package, **asked)
        with pytest.raises(RemoteError) as caught:
            lenient.submit(package, **asked)
        assert told == (code, 21, caught.value.message)
        assert (caught.value.error_code, caught.value.remote_exit_status) == (code, 21)
    plan = lenient.submit(data, "patch.plan")
    assert plan["signed"] is None
    assert [target["gates"][0]["name"] for target in plan["targets"]] == ["trust"]
    assert lenient.picture() == before


# --- the good ones ------------------------------------------------------------------------------------------

CONTENT: Final = {"job.json": JOB.data, "rest/note.txt": NOTE.data}


def unpacked(folder: Path) -> None:
    """What the valid package holds, as files for other tools to pack."""
    for part in (UNSIGNED.manifest, *FILES):
        path = folder / part.raw_name.decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part.data)


def packed_by(*command: str, needs: str = "", streams: bool = False) -> Callable[[Path], bytes]:
    def pack(folder: Path) -> bytes:
        require_program(needs or command[0])
        unpacked(folder)
        done = subprocess.run(command, cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        return done.stdout if streams else (folder / "out.zip").read_bytes()

    return pack


def packed_by_python(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    unpacked(folder)
    with zipfile.ZipFile(folder / "out.zip", "w", method) as writer:
        for name in ("manifest.json", "files", "files/job.json", "files/rest", "files/rest/note.txt"):
            writer.write(folder / name, name)
    return (folder / "out.zip").read_bytes()


def packed_by_python_into_a_pipe(folder: Path) -> bytes:
    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

    sink: Any = Pipe()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as writer:
        for part in (UNSIGNED.manifest, *FILES):
            writer.writestr(part.raw_name.decode(), part.data)
    return bytes(sink.data)


IN_ORDER: Final = ("manifest.json", "files")
GOOD: Final[dict[str, Callable[[Path], bytes]]] = {
    "as asyncsup builds it": lambda _: UNSIGNED.valid,
    "with entries for folders": lambda _: UNSIGNED.forge(folder("files/"), folder("files/rest/"), *FILES),
    "stored": lambda _: UNSIGNED.forge(*(replace(part, method=0) for part in FILES)),
    "with data descriptors": lambda _: UNSIGNED.forge(*map(streamed, FILES)),
    "with data descriptors without a signature": lambda _: UNSIGNED.forge(
        *(streamed(part, signed=False) for part in FILES)
    ),
    "with times and owners": lambda _: UNSIGNED.forge(
        *(replace(part, local_extra=extra(0x7875, bytes(11))) for part in FILES)
    ),
    "Info-ZIP": packed_by("zip", "-q", "-r", "out.zip", *IN_ORDER),
    "Info-ZIP without extras": packed_by("zip", "-q", "-X", "-r", "out.zip", *IN_ORDER),
    **{
        f"Info-ZIP {option}": packed_by("zip", "-q", option, "-r", "out.zip", *IN_ORDER)
        for option in ("-0", "-1", "-9", "-D")
    },
    "Info-ZIP into a pipe": packed_by("zip", "-q", "-r", "-", *IN_ORDER, streams=True),
    "Python": packed_by_python,
    "Python, stored": lambda folder: packed_by_python(folder, zipfile.ZIP_STORED),
    "Python into a pipe": packed_by_python_into_a_pipe,
    "Java's jar": packed_by("jar", "-cfM", "out.zip", *IN_ORDER),
    "libarchive": packed_by("bsdtar", "--format", "zip", "-cf", "out.zip", *IN_ORDER),
}


@pytest.mark.parametrize("packer", GOOD)
def test_a_good_package_stays_accepted_signed_or_not(
    packer: str, strict: Site, lenient: Site, tmp_path: Path
) -> None:
    data = GOOD[packer](tmp_path)
    path = tmp_path / "good.zip"
    path.write_bytes(data)
    assert read(path) == CONTENT
    digest = hashlib.sha256(data).hexdigest()
    assert lenient.submit(data, "patch.plan", sha256=digest)["verdict"] == "apply"
    for name in SIGNERS:
        sign_package(path, key=key(name).private)
    assert read(path) == CONTENT
    assert strict.submit(path.read_bytes(), "patch.plan")["verdict"] == "apply"


EMBEDDED: Final = {
    "ZipOutputStream of Java": (zip_forge.JAVA, {"rés/job.json", "plain.txt"}),
    "jar": (zip_forge.JAR, {"rest/job.json"}),
    "7-Zip, in the prototype's layout": (zip_forge.SEVEN_ZIP, {"work/rest/res.txt", "work/job.json"}),
    "the prototype's own": (zip_forge.prototype(), {"work/rest/res.json", "work/job.json"}),
}


@pytest.mark.parametrize("packer", EMBEDDED)
def test_what_other_tools_once_wrote_stays_accepted(packer: str, tmp_path: Path) -> None:
    data, paths = EMBEDDED[packer]
    (tmp_path / "good.zip").write_bytes(data)
    assert set(read(tmp_path / "good.zip")) == paths


def test_seven_zip_on_this_machine_is_accepted_in_the_prototypes_layout(tmp_path: Path) -> None:
    require_program("7zz")
    for name, content in (
        ("manifest.json", zip_forge.prototype_manifest()), ("new/res.json", b"res"), ("mod/job.json", b"job"),
    ):  # fmt: skip
        path = tmp_path / "patch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    subprocess.run(["7zz", "a", "-tzip", "out.zip", "patch"], cwd=tmp_path, check=True, capture_output=True)
    assert read(tmp_path / "out.zip") == {"work/rest/res.json": b"res", "work/job.json": b"job"}


def test_the_valid_package_is_applied_for_real(lenient: Site) -> None:
    """After all the refusals: the supervisor still does what it is for, and nothing was held against it."""
    data = UNSIGNED.valid
    assert lenient.submit(data, sha256=hashlib.sha256(data).hexdigest())["verdict"] == "committed"
    root = lenient.folder / "pricer"
    assert {path: (root / path).read_bytes() for path in (*CONTENT, *ROOT)} == {**ROOT, **CONTENT}
