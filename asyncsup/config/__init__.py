"""The configuration: `asyncsup.toml` in, typed and frozen settings out, or everything that is wrong with it.

=============  ===========================================================================
settings.py    the settings, one struct for each table; what there is and its default
values.py      how each type of value is written: durations, sizes, commands, signals ...
reader.py      files to settings: merging, unknown keys, names; nothing is read from disk
checks.py      what has to hold between settings, and between them and the machine
schema.py      the same as a JSON Schema, for editors
problems.py    what is wrong and where; toml_lines.py finds the line of a key
files.py       finding and loading the files: the only part that reads them
machine.py     what the checks ask of the machine
=============  ===========================================================================
"""

from asyncsup.config.files import find_config, load_config, load_patch_limits, load_supervisor
from asyncsup.config.machine import Machine
from asyncsup.config.problems import Problem
from asyncsup.config.reader import parse_config
from asyncsup.config.settings import (
    Config,
    HooksConfig,
    LivenessConfig,
    LogConfig,
    PatchConfig,
    PatchLimits,
    ProbeConfig,
    ReadyConfig,
    SupervisorConfig,
    TargetConfig,
    TargetPatchConfig,
    describe,
)
from asyncsup.config.values import (
    INSTANCE,
    UNLIMITED,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

__all__ = [
    "Config",
    "SupervisorConfig",
    "PatchConfig",
    "PatchLimits",
    "TargetConfig",
    "LogConfig",
    "ProbeConfig",
    "ReadyConfig",
    "LivenessConfig",
    "HooksConfig",
    "TargetPatchConfig",
    "find_config",
    "load_config",
    "load_supervisor",
    "load_patch_limits",
    "parse_config",
    "describe",
    "Machine",
    "Problem",
    "INSTANCE",
    "UNLIMITED",
    "parse_duration",
    "format_duration",
    "parse_size",
    "format_size",
]
