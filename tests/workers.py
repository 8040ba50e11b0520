"""For the tests that look at a great deal: every core takes a share of it."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS: Final = len(os.sched_getaffinity(0))


def in_workers(task: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """What `task` makes of each item, in processes that are forked from this one."""
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork"), logging.disable) as pool:
        return list(pool.map(task, items))
