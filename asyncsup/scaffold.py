"""`asyncsup init`: a commented `asyncsup.toml` that works as it is and shows what else there is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from asyncsup.errors import UsageError

FILE_NAME: Final = "asyncsup.toml"

# Prose begins with "# ", a setting that is commented out with "#" alone: without that one character the file
# is valid too, once there is the folder "work". Tests hold both.
TEXT: Final = """\
# What asyncsup runs, and how. Every key: docs/configuration.md.
#
#   asyncsup config check     is this file right?
#   asyncsup serve            run what is in it
#   asyncsup status           in another terminal: how is it doing?
#
# Durations are "500ms", "10s", "1m", "1h", sizes "64KiB", "50MB". Relative paths are relative to this file.
# ${NAME} is a variable of the environment, ${here} the folder of this file, ${name} the target's name,
# ${instance} the number of the instance, $$ a dollar sign.

[supervisor]
# Where this supervisor's targets run; a patch names the regions it is meant for.
#region = "us-east-1"
# Generations, database and logs; sockets. Both default to .asyncsup beside this file.
#state_dir = "/var/lib/asyncsup"
#runtime_dir = "/run/asyncsup"
#log_level = "debug"
# More targets, one file each if you like. Such a file has [target.NAME] tables only.
#include = ["conf.d/*.toml"]

[patch]
# Patches that are dropped into this folder are listed by `asyncsup patch list` ...
#inbox = "inbox"
# ... and applied by `asyncsup patch apply`, or by themselves:
#auto = true
# "digest" checks all content against its digests; "none" is for development.
#trust = "digest"
# How many old generations are kept to go back to.
#keep = 3
# How long a target may take to answer, may ask to wait, and is watched after a patch.
#ack_timeout = "10s"
#wait_max = "1m"
#probation = "2s"
# "manual": after its probation a patch waits for `asyncsup patch commit`.
#commit = "auto"

# What applies to every target that does not say otherwise.
[defaults]
#restart = "always"
#stop_timeout = "5s"
#log.max_size = "10MB"
#log.format = "timestamp"

# A target: a program that is kept running. This one says hello every second; see `asyncsup logs hello`.
[target.hello]
command = ["sh", "-c", "while true; do echo \\"hello, it is $(date)\\"; sleep 1; done"]
#directory = "."
#env = { GREETING = "hello", STATE = "${here}/state" }
#instances = 2
#umask = "022"
#stop_signal = "INT"
#limits.nofile = 4096

# A target that can be patched has a root: the folder patches change. It has to exist.
#[target.worker]
#command = ["python3", "worker.py"]
#root = "work"
#build = 1
#depends_on = ["hello"]
# How it says that it is ready: "sdk" (it uses target_sdk), "notify" (sd_notify), "none" (by staying up).
#protocol = "notify"
#start_timeout = "20s"
# How it is told that its resources have changed, if it does not use target_sdk.
#reload_signal = "HUP"
# "overlay" manages only what patches touch (resources), "tree" replaces root as a whole (programs).
#layout = "tree"
# With "tree": what the program itself writes below root, and keeps.
#persist = ["data"]
# Only resources are patched here, never the program.
#patch.allow = ["warm"]
"""


def write_scaffold(directory: Path, force: bool = False) -> Path:
    """Write `asyncsup.toml` into a folder, which is made if need be.

    Args:
        force: replace one that is there.

    Returns:
        The file that was written.

    Raises:
        UsageError: ``init.exists`` when there is one, ``init.failed`` when it cannot be written.
    """
    path = directory / FILE_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Mode "x" fails on what is there, a dangling link included; nothing can come in between.
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(TEXT)
    except FileExistsError as error:
        if error.filename != str(path):
            raise UsageError(f"{error.filename} is there and is no folder", code="init.failed") from None
        raise UsageError(
            f"{path} is there already; `asyncsup init --force` replaces it",
            code="init.exists",
            path=str(path),
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", code="init.failed") from None
    return path
