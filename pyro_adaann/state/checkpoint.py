r"""Checkpoint files: never partial, and read without running code from them.

A file is a line ``pyro_adaann checkpoint <format>``, a line with the SHA-256 of the rest, and the
rest: a dictionary of tensors, numbers and strings as `torch.save` writes it. It is written to a temporary
file, flushed to the disk and renamed, which the file system does in one operation. So the path always holds
the last complete file.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pyro_adaann.processes.group import is_first, on_first

__all__ = [
    "CheckpointKeeper",
    "read_checkpoint",
    "write_checkpoint",
]

_MAGIC = b"pyro_adaann checkpoint "
#: Increased whenever the content of the files changes.
_FORMAT = 3


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``; a failed write leaves no partial file.

    :param state: nested dictionaries and lists of tensors, numbers, strings and None.
    :raises ValueError: if there is anything else in it.
    :raises OSError: if writing fails; an earlier file at ``path`` is kept.

    Of several processes the first one writes.
    """
    if not is_first():
        return
    buffer = io.BytesIO()
    torch.save(_plain(state, "state"), buffer)
    body = buffer.getvalue()
    digest = hashlib.sha256(body).hexdigest().encode()
    path = Path(path)
    # One name, so that what a killed process leaves is overwritten by the next.
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + str(_FORMAT).encode() + b"\n" + digest + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state in a checkpoint file, its tensors on the CPU.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is not a checkpoint, of a newer version, or damaged.

    Of several processes the first one reads, for all.
    """
    return on_first(lambda: _read(path))


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    head, _, rest = Path(path).read_bytes().partition(b"\n")
    if not head.startswith(_MAGIC):
        raise ValueError(
            f"Expected a checkpoint of pyro_adaann; got {os.fspath(path)!r}, which is another kind of "
            f"file. It has not been touched: give another path."
        )
    version = head.removeprefix(_MAGIC)
    if not version.isdigit() or int(version) != _FORMAT:
        raise ValueError(
            f"Expected a checkpoint of format {_FORMAT}; got {os.fspath(path)!r} of format "
            f"{version.decode(errors='replace')}. Read it with the version of pyro_adaann that wrote it."
        )
    digest, _, body = rest.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(
            f"Expected a whole checkpoint; got {os.fspath(path)!r}, whose checksum differs: it was cut "
            f"off or changed after it was written. Use an older copy, or delete it and start anew."
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return state
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected tensors, numbers and strings in a checkpoint; got code in {os.fspath(path)!r}, "
            f"which has not been run. Do not use this file: pyro_adaann has not written it."
        ) from error


class CheckpointKeeper:
    """Writes a checkpoint at intervals; a failed write is a warning.

    :param path: the file.
    :param every: a number of steps, or a `timedelta`.
    :param get_state: returns the state to write.
    :raises ValueError: if ``every`` is not positive.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int | timedelta,
        get_state: Callable[[], dict[str, Any]],
    ) -> None:
        seconds = every.total_seconds() if isinstance(every, timedelta) else every
        if isinstance(every, bool) or not isinstance(every, int | timedelta) or not seconds > 0:
            raise ValueError(
                f"Expected `checkpoint_every` to be a number of steps >= 1 or a positive timedelta; got "
                f"{every!r}. For minutes use datetime.timedelta(minutes=5)."
            )
        self.path = path
        self.every = every
        self._get_state = get_state
        self._written_at = time.monotonic()
        self._num_steps: int | None = None

    def step(self, num_steps: int) -> None:
        """Write if it is time to; ``num_steps`` is the number of steps of the fit so far."""
        if isinstance(self.every, timedelta):
            is_due = time.monotonic() - self._written_at >= self.every.total_seconds()
        else:
            is_due = num_steps % self.every == 0
        if is_due:
            self.write(num_steps)

    def write(self, num_steps: int) -> None:
        """Write now, unless this step has been written already; warn if writing fails."""
        if self._num_steps == num_steps:
            return
        try:
            write_checkpoint(self.path, self._get_state())
        except OSError as error:
            warnings.warn(
                f"The checkpoint {os.fspath(self.path)!r} could not be written ({error}). The one "
                f"written before is intact and the fit goes on.",
                stacklevel=4,
            )
        else:
            self._num_steps = num_steps
        self._written_at = time.monotonic()


def _plain(value: Any, where: str) -> Any:
    """Return ``value`` with plain containers.

    :raises ValueError: if it contains anything that could not be read back.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # of a subclass too, such as NumPy's float64 or torch's version
    if torch.is_tensor(value):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        # A Counter, in torch's MultiStepLR, counts up from zero where a dictionary has no entry.
        container = Counter if isinstance(value, Counter) else dict
        return container({key: _plain(entry, f"{where}[{key!r}]") for key, entry in value.items()})
    if isinstance(value, list | tuple | set):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    raise ValueError(
        f"Expected tensors, numbers and strings in a checkpoint, which is read without running code; got "
        f"a {type(value).__name__} at {where}. Use a learning-rate scheduler or optimizer without it."
    )


def _sync_folder(folder: Path) -> None:
    """Force the new name to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
