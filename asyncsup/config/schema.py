"""The JSON Schema of `asyncsup.toml`, for editors that complete and check TOML. Pure.

It follows the settings classes, as the reader does: a key that is added there is in here. It is more lenient
than the reader, which knows the machine and how settings fit together; what it refuses the reader refuses.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from asyncsup.config.settings import (
    Entries,
    GroupConfig,
    Option,
    PatchConfig,
    SocketConfig,
    SupervisorConfig,
    TargetConfig,
    options,
)
from asyncsup.config.values import ValueType

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The schema of a whole file, the main one or an included one."""
    return {
        "$schema": DIALECT,
        "title": "asyncsup.toml",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "supervisor": _table(SupervisorConfig),
            "patch": _table(PatchConfig),
            "defaults": {"$ref": "#/$defs/target"},
            "target": {"type": "object", "additionalProperties": {"$ref": "#/$defs/target"}},
            "socket": {"type": "object", "additionalProperties": _table(SocketConfig)},
            "group": {"type": "object", "additionalProperties": _table(GroupConfig)},
        },
        "$defs": {"target": _table(TargetConfig)},
    }


def _table(settings: type) -> dict[str, Any]:
    # Nothing is required: what a target does not say, `[defaults]` may.
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _property(option) for name, option in options(settings).items()},
        "description": inspect.cleandoc(settings.__doc__ or "").partition("\n")[0],
    }


def _property(option: Option) -> dict[str, Any]:
    kind = option.type
    if isinstance(kind, ValueType):
        return {**_plain(kind.schema), "description": f"{option.type_text}; default: {option.default_text}"}
    if isinstance(kind, Entries):
        if kind.known is None:
            return {"type": "object", "additionalProperties": _plain(kind.value.schema)}
        names = {name: _plain(value.schema) for name, value in kind.known.items()}
        return {"type": "object", "properties": names, "additionalProperties": False}
    return _table(kind)


def _plain(schema: Any) -> Any:
    """Frozen mappings as dicts, which is what JSON encoders take."""
    if isinstance(schema, Mapping):
        return {key: _plain(value) for key, value in schema.items()}
    return [_plain(item) for item in schema] if isinstance(schema, list | tuple) else schema
