"""The SDK in real processes: the example programs, alone and supervised, forks, and what an import brings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from sdk_supervisor import WAIT_SECONDS, SdkSupervisor, prepare_params, reload_params

from target_sdk import __version__, protocol
from target_sdk.protocol import Failure, Result

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"


class Program:
    """A child process whose output is read as it comes."""

    def __init__(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ASYNCSUP_")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=directory,
            env={**inherited, **(environment or {}), "PYTHONUNBUFFERED": "1"},
        )
        self.pid = self.process.pid
        self._lines: list[str] = []
        self._seen = 0
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line after the last one expected."""

        def found() -> re.Match[str] | None:
            for index in range(self._seen, len(self._lines)):
                match = re.search(pattern, self._lines[index])
                if match:
                    self._seen = index + 1
                    return match
            return None

        with self._changed:
            match = self._changed.wait_for(found, WAIT_SECONDS)
            assert match, f"waited in vain for {pattern!r} in {self._lines[self._seen :]}"
            return match

    def end(self) -> str:
        """Ask it to stop; return everything it printed."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WAIT_SECONDS) == 0, self._lines
        self._reader.join(WAIT_SECONDS)
        return "\n".join(self._lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(WAIT_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def supervisor(short_tmp: Path) -> Iterator[SdkSupervisor]:
    with SdkSupervisor(short_tmp) as fake:
        yield fake


class Patched:
    """A root in the overlay layout whose one file is managed, and a way to patch it."""

    def __init__(self, folder: Path, name: str, first: Any) -> None:
        self.root = folder / "work"
        self.state = folder / "state"
        self.name = name
        self.root.mkdir()
        self.build = 200
        self._put(first)
        (self.root / name).symlink_to(self.state / "current/pricer" / name)

    def environment(self, supervisor: SdkSupervisor) -> dict[str, str]:
        return supervisor.environment(
            **{
                protocol.ENV_ROOT: str(self.root),
                protocol.ENV_CURRENT: str(self.state / "current/pricer"),
                protocol.ENV_BUILD: "200",
            }
        )

    def switch(self, content: Any) -> None:
        self.build += 1
        self._put(content)

    def reload(self, **more: Any) -> dict[str, Any]:
        return reload_params(build=self.build, root=str(self.root), **more)

    def _put(self, content: Any) -> None:
        generation = self.state / f"generations/pricer/{self.build}"
        generation.mkdir(parents=True)
        (generation / self.name).write_text(json.dumps(content))
        links = self.state / f"sets/{self.build}"
        links.mkdir(parents=True)
        (links / "pricer").symlink_to(f"../../generations/pricer/{self.build}")
        (self.state / "next").symlink_to(f"sets/{self.build}")
        (self.state / "next").rename(self.state / "current")


def result_of(answer: Result | Failure) -> Any:
    assert isinstance(answer, Result), answer
    return answer.result


# --- the demo target ----------------------------------------------------------------------------------------


def test_demo_target_resumes_with_the_new_job_in_the_same_process(
    supervisor: SdkSupervisor, tmp_path: Path
) -> None:
    patched = Patched(tmp_path, "job.json", {"job": "count the stars", "steps": 1000})
    program = EXAMPLES / "demo_target/demo_target.py"
    with Program(program, "0.02", environment=patched.environment(supervisor)) as demo:
        supervisor.requests("ready")
        assert supervisor.requests("status")[-1].params == {"text": "v1.0 working on 'count the stars'"}
        demo.expect(rf"demo target v1\.0 pid={demo.pid} working on job 'count the stars' step 2$")
        assert result_of(supervisor.call("prepare", prepare_params(build=201))) == {"verdict": "go_ahead"}
        patched.switch({"job": "weigh the moon", "steps": 3})
        assert result_of(supervisor.call("reload", patched.reload()))["verdict"] == "ok"
        demo.expect(rf"demo target v1\.0 pid={demo.pid} resumed with job 'weigh the moon' \(build 201\)$")
        demo.expect(r"working on job 'weigh the moon' step 1$")
        demo.expect(r"working on job 'weigh the moon' step 3$")
        demo.expect(r"working on job 'weigh the moon' step 1$")
        assert supervisor.requests("status", 2)[-1].params == {"text": "v1.0 working on 'weigh the moon'"}
        patched.switch({"no job": "at all"})
        answer = result_of(supervisor.call("reload", patched.reload(patch="p2")))
        assert (answer["verdict"], answer["reason"]) == ("failed", "KeyError: 'job'")
        demo.expect(r"working on job 'weigh the moon' step 2$")
        demo.end()
    assert supervisor.methods()[-1] == "stopping"


def test_demo_target_runs_alone() -> None:
    with Program(EXAMPLES / "demo_target/demo_target.py", "0.02") as demo:
        demo.expect(r"demo target v1\.0 pid=\d+ working on job 'count the stars' step 3$")
        assert "Traceback" not in demo.end()


def test_demo_target_tells_a_restarted_supervisor_all_it_needs(
    supervisor: SdkSupervisor, tmp_path: Path
) -> None:
    patched = Patched(tmp_path, "job.json", {"job": "count the stars", "steps": 1000})
    program = EXAMPLES / "demo_target/demo_target.py"
    with Program(program, "0.02", environment=patched.environment(supervisor)) as demo:
        supervisor.requests("ready")
        patched.switch({"job": "weigh the moon", "steps": 3})
        supervisor.call("reload", patched.reload())
        supervisor.stop()
        demo.expect("weigh the moon")
        supervisor.start()
        supervisor.requests("status", 3)
        hello = supervisor.requests("hello", 2)[-1]
        assert hello.params["pid"] == demo.pid
        assert hello.params["build"] == 201
        assert supervisor.requests("ready", 2)[-1].params == {"build": 201}
        demo.end()


# --- the example in the documentation -----------------------------------------------------------------------


@pytest.fixture
def documented(tmp_path: Path) -> Path:
    """The program that docs/sdk.md begins with."""
    block = re.search(r"```python\n(.*?)```", (REPOSITORY / "docs/sdk.md").read_text(), re.DOTALL)
    assert block
    program = tmp_path / "program.py"
    program.write_text(block[1])
    return program


def test_the_documented_example_takes_up_new_prices(
    supervisor: SdkSupervisor, documented: Path, tmp_path: Path
) -> None:
    patched = Patched(tmp_path, "prices.json", {"apple": 1.0})
    with Program(documented, environment=patched.environment(supervisor)) as program:
        program.expect(r"apples cost 1\.0")
        supervisor.requests("ready")
        assert result_of(supervisor.call("prepare", prepare_params())) == {"verdict": "go_ahead"}
        patched.switch({"apple": 2.0})
        assert result_of(supervisor.call("reload", patched.reload()))["verdict"] == "ok"
        program.expect(r"apples cost 2\.0")


def test_the_documented_example_runs_alone(documented: Path, tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text('{"apple": 1.5}')
    with Program(documented, directory=tmp_path) as program:
        program.expect(r"apples cost 1\.5")


# --- the price service --------------------------------------------------------------------------------------


def http(method: str, url: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, method=method)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_price_service_changes_its_prices_without_losing_a_request_and_waits_for_orders(
    supervisor: SdkSupervisor, tmp_path: Path
) -> None:
    patched = Patched(tmp_path, "prices.json", {"apple": 1.0})
    program = EXAMPLES / "price_service.py"
    with Program(program, "0", environment=patched.environment(supervisor)) as service:
        url = service.expect(r"serving on (http://\S+)/prices")[1]
        supervisor.requests("ready")
        assert http("GET", f"{url}/prices") == (200, {"apple": 1.0})
        assert http("GET", f"{url}/prices/pear")[0] == 404
        assert http("DELETE", f"{url}/prices")[0] == 404

        ordered: list[Any] = []

        def order() -> threading.Thread:
            made = threading.Thread(target=lambda: ordered.append(http("POST", f"{url}/orders/apple")))
            made.start()
            return made

        ordering = order()
        while (answer := result_of(supervisor.call("prepare", prepare_params())))["verdict"] == "go_ahead":
            if not ordering.is_alive():  # it was over before anybody looked
                ordering = order()
        assert answer == {"verdict": "wait", "retry_after": 0.2, "reason": "1 orders in flight"}
        ordering.join()
        assert ordered
        assert ordered == [(200, {"name": "apple", "paid": 1.0})] * len(ordered)
        assert result_of(supervisor.call("prepare", prepare_params()))["verdict"] == "go_ahead"

        patched.switch({"apple": 2.0, "pear": 0.9})
        assert result_of(supervisor.call("reload", patched.reload()))["verdict"] == "ok"
        assert http("GET", f"{url}/prices/apple") == (200, {"name": "apple", "price": 2.0})
        patched.switch({})
        answer = result_of(supervisor.call("reload", patched.reload(patch="p2")))
        assert answer["reason"] == "ValueError: prices.json holds no prices"
        assert http("GET", f"{url}/prices") == (200, {"apple": 2.0, "pear": 0.9})
        assert "Traceback" not in service.end().split("the handler for 'reload' failed")[0]


def test_price_service_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text('{"apple": 1.5}')
    with Program(EXAMPLES / "price_service.py", "0", tmp_path) as service:
        url = service.expect(r"serving on (http://\S+)/prices")[1]
        assert http("GET", f"{url}/prices/apple") == (200, {"name": "apple", "price": 1.5})
        assert "Traceback" not in service.end()


# --- the threaded worker ------------------------------------------------------------------------------------


def patch_worker(supervisor: SdkSupervisor) -> None:
    """Ask until the answer is go ahead, as the supervisor does."""
    while (answer := result_of(supervisor.call("prepare", prepare_params())))["verdict"] != "go_ahead":
        assert answer["verdict"] == "wait"
        assert re.fullmatch(r"\d+ batches under way", answer["reason"])


def test_threaded_worker_is_patched_between_batches_and_resumes_when_a_patch_is_called_off(
    supervisor: SdkSupervisor, tmp_path: Path
) -> None:
    patched = Patched(tmp_path, "rates.json", {"EUR": 1.0})
    program = EXAMPLES / "threaded_worker.py"
    with Program(program, environment=patched.environment(supervisor)) as worker:
        worker.expect(r"batch: .* by \{'EUR': 1\.0\}")
        patch_worker(supervisor)
        patched.switch({"EUR": 1.5})
        assert result_of(supervisor.call("reload", patched.reload()))["verdict"] == "ok"
        worker.expect(r"reloaded: build 201, \{'EUR': 1\.5\}")
        worker.expect(r"batch: .* by \{'EUR': 1\.5\}")
        patch_worker(supervisor)
        assert result_of(supervisor.call("abort", {"patch": "p1"})) == {}
        worker.expect("called off")
        worker.expect("batch")
        patch_worker(supervisor)
        supervisor.stop()
        worker.expect("called off")
        worker.expect("batch")
        supervisor.start()
        output = worker.end()
        assert "Traceback" not in output
    reloaded = output.index("reloaded")
    assert "'EUR': 1.0" not in output[reloaded:]
    assert "'EUR': 1.5" not in output[:reloaded]


def test_threaded_worker_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text('{"EUR": 1.0}')
    with Program(EXAMPLES / "threaded_worker.py", tmp_path) as worker:
        worker.expect("batch")
        assert "Traceback" not in worker.end()


# --- forks --------------------------------------------------------------------------------------------------

FORKING = """
import gc, os, sys, threading, warnings
from target_sdk import Target

warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, in later Pythons

target = Target(handlers=sys.argv[1])
reloaded = threading.Event()
target.on_reload(lambda patch: reloaded.set())
with target:
    target.ready()
    if target.managed:
        target.status("parent")
    child = os.fork()
    if child == 0:
        assert not target.managed
        target.ready(); target.status("child"); target.extend(5); target.stopping()
        if sys.argv[1] == "program":
            assert target.run_pending(timeout=0.01) == 0
        with target.snapshot() as files:
            assert files.exists("fork.py"), files.walk()
    else:
        _, status = os.waitpid(child, 0)
        print("child ended", status, flush=True)
        while sys.argv[1] == "program" and not reloaded.is_set():
            target.run_pending(timeout=None)
        reloaded.wait()
gc.collect()
print("child" if child == 0 else "parent", "left the target", flush=True)
"""


@pytest.mark.parametrize("handlers", ["program", "thread"])
def test_a_forked_child_leaves_the_connection_to_its_parent(
    supervisor: SdkSupervisor, tmp_path: Path, handlers: str
) -> None:
    script = tmp_path / "fork.py"
    script.write_text(FORKING)
    environment = supervisor.environment(**{protocol.ENV_ROOT: str(tmp_path)})
    with Program(script, handlers, environment=environment) as program:
        program.expect("child left the target")
        program.expect("child ended 0")
        assert result_of(supervisor.call("ping")) == {}
        assert result_of(supervisor.call("reload", reload_params()))["verdict"] == "ok"
        program.expect("parent left the target")
        assert program.process.wait(WAIT_SECONDS) == 0
        assert supervisor.requests("stopping")
    assert {request.params["pid"] for request in supervisor.requests("hello")} == {program.pid}
    assert [request.params["text"] for request in supervisor.requests("status")] == ["parent"]
    assert "extend" not in supervisor.methods()


# --- what an import brings ----------------------------------------------------------------------------------


def run_code(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return done.stdout


def packages_after(statement: str) -> set[str]:
    names = run_code(f"import sys; {statement}; print(*sys.modules, sep='\\n')").split()
    return {name.partition(".")[0] for name in names}


def test_importing_the_sdk_brings_nothing_but_itself_zeromq_and_orjson() -> None:
    packages = packages_after("import target_sdk")
    assert "target_sdk" in packages
    assert packages.isdisjoint({"asyncsup", "anyio", "asyncio", "socket"})
    more = packages - packages_after("import zmq, orjson") - set(sys.stdlib_module_names)
    assert more == {"target_sdk"}


def test_the_distribution_depends_on_pyzmq_and_orjson_only() -> None:
    project = tomllib.loads((REPOSITORY / "target_sdk/pyproject.toml").read_text())["project"]
    assert project["name"] == "asyncsup-target-sdk"
    assert {re.split("[<>=]", name)[0] for name in project["dependencies"]} == {"pyzmq", "orjson"}


def test_the_wheel_holds_the_sdk_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=REPOSITORY / "target_sdk",
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob(f"asyncsup_target_sdk-{__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    sources = {f"target_sdk/{path.name}" for path in (REPOSITORY / "target_sdk").glob("*.py")}
    assert set(names) == sources | {"target_sdk/py.typed"}
