"""Output into a rotated file: MB/s, against ``child | cat > file`` in the same run.

The child writes a fixed number of bytes and ends; the time is from its first write until it has ended and all
of it is in the files. Ours and the floor take turns, each beginning with no file.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

from rig import compile_floor, folder, median, row, supervisor

FORMATS = ("raw", "timestamp", "json")


def through_cat(program: Path, home: Path, size: int, count: int) -> float:
    """MB/s into a file that `cat` writes."""
    file, began = home / "floor.log", home / "began"
    with file.open("wb") as out, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out) as cat:
        assert cat.stdin is not None
        subprocess.run([program, "write", str(size), str(count), began], stdout=cat.stdin, check=True)
        cat.stdin.close()
    took = time.monotonic() - float(began.read_text())
    assert file.stat().st_size == size * count
    file.unlink()
    return size * count / took / 1e6


class Measured:
    """A target that is started again and again, with its output in files of 50 MB, as they are by default."""

    def __init__(self, program: Path, home: Path, size: int, count: int) -> None:
        self.program, self.home, self.size, self.count = program, home, size, count

    def compare(self, format_: str, rounds: int) -> tuple[float, float]:
        """MB/s of ours and of the floor."""
        began = self.home / "began"
        text = (
            f'[target.t]\ncommand = ["{self.program}", "write", "{self.size}", "{self.count}", "{began}"]\n'
            'autostart = false\nrestart = "never"\nmin_uptime = 0\n'
            f'log.format = "{format_}"\nlog.max_files = 100\n'
        )
        ours: list[float] = []
        floor: list[float] = []
        with supervisor(self.home, text) as (client, _):
            logs = self.home / ".asyncsup/logs"
            for _ in range(rounds):
                floor.append(through_cat(self.program, self.home, self.size, self.count))
                with client.subscribe() as events:
                    client.call("start", names=["t"], wait=False)
                    next(event for event in events if event.data.get("to") == "exited")
                took = time.monotonic() - float(began.read_text())
                written = sum(path.stat().st_size for path in logs.iterdir())
                if written < self.size * self.count:
                    raise RuntimeError("something is missing")
                for path in logs.iterdir():
                    path.unlink()
                client.call("logs.reopen")
                ours.append(self.size * self.count / took / 1e6)
        return median(ours), median(floor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with folder() as home:
        program = compile_floor(home)
        for size, what, share in ((4096, "4 KiB writes", 1), (64, "64-byte lines", 4)):
            measured = Measured(program, home, size, args.megabytes * 10**6 // size // share)
            for format_ in FORMATS:
                ours, floor = measured.compare(format_, args.rounds)
                row(f"{what}, {format_}", ours, "MB/s", floor, higher_is_better=True)


if __name__ == "__main__":
    main()
