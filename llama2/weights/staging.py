"""Owns how an output folder comes to its name: written beside it, renamed when complete, the old one kept till then.

Knows nothing of what the folder holds.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)


class StagedFolder:
    """The folder `partial`, which takes the name `target` when it is complete.

    `.NAME.partial` and, during the swap, `.NAME.replaced` stand beside `target`. After a crash at any moment, `target`
    is either the old folder or the new one, or the old one waits as `.NAME.replaced` and `recover` puts it back.
    """

    def __init__(self, target: Path | str) -> None:
        self.target = Path(target).expanduser().resolve()
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._lock: int | None = None

    def open(self, *, size: int) -> None:
        """Make the empty folder `partial`, for about `size` bytes. What a killed run left there is removed.

        Raises:
            ValueError: another process is writing there, or the disk has too little space.
            OSError: the place cannot be written.
        """
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Held by the open descriptor: a process that is killed leaves no lock behind.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ValueError(f"another process is writing {self.target}") from None
        self._lock = lock
        for leftover in self.partial.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        free = shutil.disk_usage(self.partial).free
        if free < size:
            self.discard()
            raise ValueError(
                f"not enough disk space for {self.target}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"
            )

    def recover(self) -> None:
        """Finish what a run that was killed during its swap left behind."""
        if not self._replaced.exists():
            return
        if self.target.exists():
            shutil.rmtree(self._replaced)
        else:
            logger.warning("%s was being replaced when a former run was killed: it is put back", self.target)
            self._replaced.rename(self.target)

    def commit(self) -> None:
        """Give the complete folder its name. What stood there is deleted, after the new one has taken its place."""
        for path in [*self.partial.iterdir(), self.partial]:
            _sync(path)
        if self.target.exists():
            self.target.rename(self._replaced)
        try:
            self.partial.rename(self.target)
        except BaseException:
            if self._replaced.exists() and not self.target.exists():
                self._replaced.rename(self.target)
            raise
        _sync(self.target.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._unlock()

    def discard(self) -> None:
        """Remove `partial` and leave `target` as it is. May be called from any process of the group, and twice."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
