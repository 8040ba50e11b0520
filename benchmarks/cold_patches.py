"""What cold patches cost those who use the service, beside a replacement done by hand in the same run.

    python benchmarks/cold_patches.py [--patches 100] [--rate 200]
                                      [--modes new keep-alive "slow in flight" websocket]

A real `asyncsup serve` patches `examples/asgi_service.py` again and again under a load, once as it is (with
the SDK's drain) with broken builds in between, and once as a stock uvicorn service. A window is the time
from the order until the old process (or the broken one) has gone; steady is all other time of the same loads.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from load import Load, Results, Sample, Summary
from reference_handover import CASES, EXAMPLES, service
from rig import folder, median, supervisor

from asyncsup.client import ControlClient
from asyncsup.errors import RemoteError
from asyncsup.patch.build import build_patch
from asyncsup.patch.manifest import Kind

Fault = Literal["crashes", "is never ready", "is ready, then fails", "is ready, then is killed"]

DRAINED: Final = "app = Drain(service, target)\n"
"""The line of the example that is changed for everything else."""

FAULTS: Final[dict[Fault, str]] = {
    "crashes": "raise SystemExit('this build cannot be imported')\n",
    "is never ready": "import time\ntime.sleep(3600)\n",
    "is ready, then fails": DRAINED
    + """
import threading
say_ready = target.ready

def ready():
    say_ready()
    threading.Timer(0.2, target.failed, ["this build regrets"]).start()

target.ready = ready
""",
    "is ready, then is killed": DRAINED
    + """
import signal
import threading
say_ready = target.ready

def ready():
    say_ready()
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGKILL]).start()

target.ready = ready
""",
}
DEADLY: Final[frozenset[Fault]] = frozenset({"is ready, then is killed"})
"""What such a build has in its hands is lost with it; the others have to cost nothing."""
PROBATION_SECONDS: Final = 20.0
"""Of a build that is going to fail in it; the others have none."""
START_SECONDS: Final = 8
"""Within which a build has to be ready."""
WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02
TURN: Final = 5
"""So many changes of one service, then as many of the next."""


class Patched:
    """A service on a managed socket of a running supervisor; each change is a cold patch.

    Args:
        stock: without the SDK: readiness is read from its output, and it is told to end by its stop signal.
        port: to listen on; one that is free when none is given.
    """

    def __init__(self, home: Path, *, stock: bool = False, port: int | None = None) -> None:
        self.home = home
        source = (EXAMPLES / "asgi_service.py").read_text()
        assert source.count(DRAINED) == 1
        self._source = source.replace(DRAINED, "app = service\n") if stock else source
        self._builds = 0
        self._current = home / "app"
        self._current.mkdir()
        (self._current / "asgi_service.py").write_text(self._source)
        self._old = self._new(self._source)
        if port is None:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        self.port: int = port
        uvicorn = [
            sys.executable,
            "-m",
            "uvicorn",
            "--fd",
            "$(socket.web)",
            "--no-access-log",
            "asgi_service:app",
        ]
        kind = 'ready.log = "Uvicorn running"' if stock else 'protocol = "sdk"'
        self.settings = (
            f'[patch]\ntrust = "none"\nprobation = "0s"\nkeep = 2\n'
            f'[socket.web]\nlisten = "tcp://127.0.0.1:{self.port}"\nbacklog = 1024\n'
            f'[target.web]\ncommand = {json.dumps(uvicorn)}\ndirectory = "app"\nroot = "app"\n'
            f'sockets = ["web"]\n'
            f'{kind}\nstart_timeout = "{START_SECONDS}s"\n'
        )

    def _new(self, source: str) -> Path:
        self._builds += 1
        made = self.home / f"build-{self._builds}"
        made.mkdir()
        (made / "asgi_service.py").write_text(
            f"{source}# build {self._builds}\n" if self._builds > 1 else source
        )
        return made

    def change(self, control: ControlClient, fault: Fault | None = None) -> Callable[[], None]:
        """Prepare the next patch; what is returned applies it, and returns when one process is left.

        Raises (what is returned):
            RemoteError: a good build was refused or undone.
            RuntimeError: a broken build was kept, or took the old process with it.
            TimeoutError: whoever has to go does not.
        """
        new = self._new(self._source.replace(DRAINED, FAULTS[fault]) if fault else self._source)
        package = self.home / f"{self._builds}.zip"
        build_patch(
            old=self._old, new=new, output=package, name="web", version=str(self._builds),
            build=self._builds, kind=Kind.COLD, targets=["web"], regions=["local"],
            probation=PROBATION_SECONDS if fault else None,
        )  # fmt: skip

        def apply() -> None:
            before = self.pid(control)
            try:
                control.call("patch.apply", {"path": str(package)}, timeout=WAIT_SECONDS)
            except RemoteError as error:
                if fault is None or error.error_code != "patch.rolled_back":
                    raise
            deadline = time.monotonic() + WAIT_SECONDS
            while self.others(control):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"two processes serve {WAIT_SECONDS:g} s after the patch")
                time.sleep(POLL_SECONDS)
            if (self.pid(control) == before) != (fault is not None):
                raise RuntimeError(
                    f"another process serves than should, after a build that {fault or 'is good'}"
                )

        if fault is None:
            self._old = new
        return apply

    @staticmethod
    def pid(control: ControlClient) -> int:
        return int(control.call("status", names=["web"])["targets"][0]["instances"][0]["pid"])

    @staticmethod
    def others(control: ControlClient) -> list[object]:
        return list(control.call("status", names=["web"])["targets"][0]["others"])


Window = tuple[float, float]
"""From when until when, as of `time.monotonic`."""

Prepare = Callable[[Fault | None], Callable[[], object]]


@contextlib.contextmanager
def patched(*, stock: bool = False) -> Iterator[tuple[int, Prepare]]:
    """The port of such a service, and what prepares its next change."""
    with folder() as home:
        one = Patched(home, stock=stock)
        with supervisor(home, one.settings) as (control, _):
            control.call("wait", {"names": ["web"], "for": "ready", "timeout": WAIT_SECONDS})
            yield one.port, lambda fault: one.change(control, fault)


@contextlib.contextmanager
def by_hand() -> Iterator[tuple[int, Prepare]]:
    with service("asgi") as slot:
        yield slot.port, lambda _: slot.replace


@dataclass(slots=True)
class Seen:
    """The requests that were due in the windows of one kind of change, those that were due in none of any
    kind, and the longest gap of each window (milliseconds)."""

    inside: list[Sample] = field(default_factory=list)
    outside: list[Sample] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def take(self, results: Results, windows: Sequence[Window], others: Sequence[Window]) -> None:
        """Add what one load has measured.

        Args:
            others: windows of changes of other kinds: what was due in them does not count here.
        """
        for sample in results.samples:
            if _is_in(windows, sample):
                self.inside.append(sample)
            elif not _is_in(others, sample):
                self.outside.append(sample)
        self.gaps += [results.between(start, end).gap for start, end in windows]

    @property
    def during(self) -> Summary:
        return Results(self.inside).between()

    @property
    def steady(self) -> Summary:
        return Results(self.outside).between()


def _is_in(windows: Sequence[Window], sample: Sample) -> bool:
    return any(start <= sample.due < end for start, end in windows)


def run(
    place: tuple[int, Prepare],
    case: str,
    seen: Mapping[Fault | None, Seen],
    *,
    changes: Sequence[Fault | None],
    rate: float,
    pause: float = 1.0,
) -> None:
    """One change after the other under load.

    Args:
        case: of `reference_handover.CASES`.
        seen: what is added to, by kind of change.
        pause: seconds of load without a change, before the first and after each.
    """
    port, prepare = place
    path, mode, share = CASES[case]
    scheme = "ws" if mode == "websocket" else "http"
    windows: list[tuple[Fault | None, Window]] = []
    with Load(f"{scheme}://127.0.0.1:{port}{path}", mode=mode, rate=rate * share) as load:
        time.sleep(2 * pause)
        for fault in changes:
            change = prepare(fault)
            began = time.monotonic()
            change()
            windows.append((fault, (began, time.monotonic())))
            time.sleep(pause)
    results = load.results
    for kind in set(changes):
        mine = [window for of, window in windows if of == kind]
        seen[kind].take(results, mine, [window for of, window in windows if of != kind])


def turns(patches: int) -> list[tuple[int, list[Fault]]]:
    """How many good builds there are in each turn, and the broken ones that come in the middle of them: one
    in each, each fault in turn and at least once.
    """
    sizes = [min(TURN, patches - done) for done in range(0, patches, TURN)]
    broken = list(itertools.islice(itertools.cycle(FAULTS), max(len(sizes), len(FAULTS))))
    return [(size, broken[number :: len(sizes)]) for number, size in enumerate(sizes)]


HEAD: Final = (
    "| service | connections | changes | requests | failed (per change) | of which | p50 / p99 / max, ms "
    "| steady, the same | p99 x by hand | longest gap: median / max, ms | median x by hand | sent again |\n"
    "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|"
)
"""All of it is about the windows, but for ``steady`` (with what has failed, if anything) and ``sent again``:
messages of websockets that crossed a goodbye, at any time.
"""


def line(who: str, case: str, seen: Seen, hand: Seen | None = None) -> None:
    during, steady = seen.during, seen.steady
    kinds = ", ".join(f"{count} {name}" for name, count in during.outcomes.items() if name != "ok")
    meanwhile = f", {steady.failed} failed" if steady.failed else ""
    p99 = f"{during.p99 / hand.during.p99:.2f}" if hand else ""
    gap = f"{median(seen.gaps) / median(hand.gaps):.2f}" if hand else ""
    print(
        f"| {who} | {case} | {len(seen.gaps)} | {during.requests} "
        f"| {during.failed} ({during.failed / len(seen.gaps):.2g}) | {kinds} "
        f"| {latencies(during)} | {latencies(steady)}{meanwhile} | {p99} "
        f"| {median(seen.gaps):.0f} / {max(seen.gaps):.0f} | {gap} | {during.resent + steady.resent} |",
        flush=True,
    )


def latencies(summary: Summary) -> str:
    return f"{summary.p50:.1f} / {summary.p99:.1f} / {summary.max:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Cold patches of a service under load.")
    parser.add_argument("--patches", type=int, default=100, help="in each mode (default: 100)")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (default: 200)")
    parser.add_argument("--modes", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    # With it each new process would compile all of its modules.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    failed = 0
    print(HEAD, flush=True)
    for case in options.modes:
        with by_hand() as hand, patched() as ours, patched(stock=True) as stock:
            by_hand_seen, stock_seen = Seen(), Seen()
            seen: dict[Fault | None, Seen] = {fault: Seen() for fault in (None, *FAULTS)}
            # In turns, so that a change of the machine's mood meets all of them.
            for size, broken in turns(options.patches):
                good: list[Fault | None] = [None] * size
                mixed = [*good[: size // 2], *broken, *good[size // 2 :]]
                run(hand, case, {None: by_hand_seen}, changes=good, rate=options.rate)
                run(ours, case, seen, changes=mixed, rate=options.rate)
                run(stock, case, {None: stock_seen}, changes=good, rate=options.rate)
            line("replaced by hand", case, by_hand_seen, by_hand_seen)
            line("cooperating", case, seen[None], by_hand_seen)
            line("stock uvicorn", case, stock_seen, by_hand_seen)
            for fault in FAULTS:
                line(f"a build that {fault}", case, seen[fault])
            # The steady time of broken builds is that of good ones.
            to_cost_nothing = [one.during for fault, one in seen.items() if fault not in DEADLY]
            failed += sum(during.failed for during in to_cost_nothing) + seen[None].steady.failed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
