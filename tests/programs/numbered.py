"""Writes numbered lines and keeps an account of how many, one file per life, for whoever checks them.

Arguments: the folder of the accounts; lines per burst; seconds between two bursts; after how many bursts it
kills itself (0: never). Two of one instance at a time are a fault, and noted in the folder.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

folder, burst, pause, deadly = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
instance = os.environ["ASYNCSUP_INSTANCE"]
life = f"{instance}-{os.getpid()}-{time.monotonic_ns()}"

lock = os.open(folder / f"{instance}.lock", os.O_RDWR | os.O_CREAT)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (folder / f"TWICE-{life}").touch()

ending: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: ending.append(number))
account = os.open(folder / f"life-{life}", os.O_RDWR | os.O_CREAT, 0o600)
count = bursts = 0
while not ending:
    text = b"".join(b"%s %09d %s\n" % (life.encode(), n, b"x" * 30) for n in range(count, count + burst))
    view = memoryview(text)
    while view:
        view = view[os.write(1, view) :]
    count += burst
    os.pwrite(account, b"%012d" % count, 0)
    bursts += 1
    if bursts == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(pause)
