"""Whether the Hugging Face hub can be reached, found out once and quickly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fail_fast_offline", "hub_is_reachable"]

TIMEOUT = 10.0
"""Seconds that the hub has to answer."""


@functools.cache
def hub_is_reachable() -> bool:
    """Whether the hub answers at all; no, where HF_HUB_OFFLINE says so. Asked once in a process."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # of the network; which classes these are differs between versions of huggingface_hub
        return False
    return True


@contextmanager
def fail_fast_offline() -> Iterator[None]:
    """In it, where the hub cannot be reached, `datasets` takes what is in its cache or fails at once; by itself it
    would ask for every data set six times within half a minute, and print each."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not hub_is_reachable()
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
