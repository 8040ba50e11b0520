"""gunicorn as a target that loses no request when it is replaced.

    gunicorn -c gunicorn.conf.py --worker-class gthread --threads 4 service:app

asyncsup: sockets = ["web"], and `graceful_timeout` below `stop_timeout`. gunicorn finds the socket itself,
and when it is told to stop it stops accepting and answers what is in flight. What it cannot do by itself is
to say `Connection: close` before that; the hooks here do it. (Workers of class `sync` say it always.)
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

from target_sdk import Target

keepalive = 2  # seconds
graceful_timeout = 30

target = Target(handlers="thread")
first_worker, tell_master = os.pipe()
draining = mmap.mmap(-1, 1)  # shared by the master and its workers
stopped = threading.Event()


@target.on_drain
def drain(seconds: float) -> None:
    """In the master. A connection that is idle now has its last request, or has been idle for too long."""
    draining[0] = 1
    stopped.wait(min(seconds, keepalive + 1))


def pre_request(worker: Any, request: Any) -> None:
    """In a worker, before each request: the answers of one that keeps no connections say so."""
    if draining[0]:
        worker.cfg.set("keepalive", 0)


def when_ready(server: Any) -> None:
    """In the master, before it starts workers."""
    target.__enter__()
    threading.Thread(target=wait_for_worker, daemon=True).start()


def wait_for_worker() -> None:
    os.read(first_worker, 1)
    target.ready()


def post_worker_init(worker: Any) -> None:
    """In a worker that has loaded the application."""
    os.write(tell_master, b"\0")


def on_exit(server: Any) -> None:
    """In the master, at its end."""
    stopped.set()
    target.__exit__(None, None, None)
