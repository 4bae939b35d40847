"""One writer of a folder at a time, by a lock of the system, which ends with its process in every case."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)


class FolderInUseError(OSError):
    """Another process, or another call in this one, writes to the folder."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which exists.

    Raises:
        FolderInUseError: Another run holds it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(
                f"{folder} is being written to by another run. Wait for it or end it, or give another folder."
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning(f"{folder} cannot be locked ({error}): see to it that no other run writes there.")
        yield
    finally:
        os.close(handle)
