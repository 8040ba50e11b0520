"""The configuration, for verbs that read it themselves: the file of ``-c``, or the one in the usual place."""

from __future__ import annotations

import os
from pathlib import Path

from asyncsup.cli.session import Session
from asyncsup.config import Config, PatchLimits, find_config, load_config, load_patch_limits
from asyncsup.errors import ConfigError


def config_path(session: Session) -> Path:
    """Raises ConfigError when there is none."""
    named = session.args.config
    return find_config(None if named is None else Path(named), os.environ)


def read_config(session: Session) -> Config:
    """All of it, checked; what it warns of is said.

    Raises:
        ConfigError: with every problem.
    """
    config = load_config(config_path(session))
    for warning in config.warnings:
        session.out.note(f"warning: {warning}")
    return config


def read_limits(session: Session) -> PatchLimits:
    """`[patch.limits]` of the configuration that is named or found; the defaults where there is none."""
    try:
        path = config_path(session)
    except ConfigError:
        if session.args.config is not None or os.environ.get("ASYNCSUP_CONFIG"):
            raise
        return PatchLimits()
    return load_patch_limits(path)
