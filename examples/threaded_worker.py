"""A threaded program that is patched at a safe point: workers convert amounts by rates that change under way.

    python threaded_worker.py FOLDER        FOLDER holds rates.json: {"EUR": 1.0, "USD": 1.1}

Its main thread has nothing to do but to wait, so it is where the handlers run. A batch must be converted by
one set of rates from its first amount to its last: while batches are under way the answer to a patch is
`wait`, and no new one is begun until the patch has come or was called off.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
import time

from target_sdk import Patch, PrepareAnswer, Target, wait

WORKERS = 2
BATCH = 20

target = Target(root=sys.argv[1] if len(sys.argv) > 1 else ".")
stop = threading.Event()


class Work:
    """What the workers share."""

    def __init__(self) -> None:
        self.rates: dict[str, float] = {}
        self.may_begin = threading.Event()
        self.under_way = 0
        self.lock = threading.Lock()

    def load(self) -> None:
        with target.snapshot() as files:
            self.rates = files.json("rates.json")

    def run(self) -> None:
        while not stop.is_set():
            if not self.may_begin.wait(timeout=1.0):
                continue
            with self.lock:
                # Asked again under the lock: `prepare` counts the batches under it.
                if not self.may_begin.is_set():
                    continue
                self.under_way += 1
            try:
                self.convert_batch()
            finally:
                with self.lock:
                    self.under_way -= 1
            stop.wait(0.05)

    def convert_batch(self) -> None:
        total = 0.0
        for _ in range(BATCH):
            currency = random.choice(list(self.rates))
            total += random.randrange(1, 1000) * self.rates[currency]
            time.sleep(0.005)
        print(f"batch: {total:.2f} by {self.rates}", flush=True)


work = Work()


@target.on_prepare
def prepare(patch: Patch) -> PrepareAnswer | None:
    work.may_begin.clear()
    with work.lock:
        count = work.under_way
    return wait(0.1, f"{count} batches under way") if count else None


@target.on_reload
def reload(patch: Patch) -> None:
    work.load()
    work.may_begin.set()
    print(f"reloaded: build {patch.build}, {work.rates}", flush=True)


@target.on_abort
def abort(patch: Patch) -> None:
    work.may_begin.set()
    print("the patch was called off", flush=True)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    work.load()
    work.may_begin.set()
    workers = [threading.Thread(target=work.run) for _ in range(WORKERS)]
    with target:
        for worker in workers:
            worker.start()
        target.ready()
        while not stop.is_set():
            target.run_pending(timeout=0.5)
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
