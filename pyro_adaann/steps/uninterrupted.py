"""Delay Ctrl-C until an update is complete."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay SIGINT within the block, and deliver it at its end.

    An optimizer interrupted halfway leaves some parameters a step ahead of the others. Only in the main
    thread, where Python delivers signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    handler: Any = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, or not of Python
        yield
        return
    signal.signal(signal.SIGINT, lambda signum, frame: caught.append((signum, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[-1])
