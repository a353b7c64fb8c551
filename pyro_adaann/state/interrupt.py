"""Ctrl-C between two steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["InterruptGuard"]


class InterruptGuard:
    """Within the block the first Ctrl-C sets :attr:`requested`; the second raises `KeyboardInterrupt`.

    An optimizer interrupted halfway would leave some parameters a step ahead of the others. Only in
    the main thread, where Python delivers signals, and only where nobody else handles them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_installed = False

    def __enter__(self) -> InterruptGuard:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._is_installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._is_installed = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
