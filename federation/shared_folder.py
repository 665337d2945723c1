"""A repository's folder that several processes write to: one at a time, each knowing the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aggregation import durable
from federation.commit import finish
from federation.folder_lock import FolderLock
from federation.metadata_files import load
from federation.published import NotFoundError
from federation.reading import Reading


def lock_of(folder: Path) -> FolderLock:
    """What whoever writes to a repository's folder must hold."""
    return FolderLock(folder.with_name(folder.name + ".lock"))


class SharedReading(Reading):
    """A repository as others may be changing it.

    Args:
        folder: of the repository.
        finishing: carry out first what a kill has left half done.
    """

    def __init__(self, folder: Path, *, finishing: bool) -> None:
        self._lock = lock_of(folder)
        if not finishing:
            super().__init__(folder)
            return
        with self._lock.held():
            finish(folder)
            super().__init__(folder)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While nobody else changes it; what others have written is known, and finished.

        Raises:
            StorageError: another process does not let go of it, or the disk refused.
        """
        with self._lock.held() as outermost:
            if outermost:
                finish(self.folder)
                self._catch_up()
            yield

    def refresh(self) -> None:
        """Take in what another process has written; one small read if there is nothing.

        Raises:
            RepositoryError: what is there does not verify; what was known holds on.
            StorageError: another process is writing, and does not come to an end.
        """
        if self._is_behind():
            with self.changing():
                pass

    def timestamp(self) -> bytes:
        """The file that says what is current, as far as it is known here."""
        return self._state.files["timestamp"]

    def locate(self, path: str) -> Path:
        """The file behind a path; one that another process has just published is found too.

        Raises:
            NotFoundError: nothing that is offered; the path is never followed outside.
        """
        try:
            return super().locate(path)
        except NotFoundError:
            try:
                if not self._is_behind():
                    raise
                with self._lock.held(patience=0.0):
                    self._catch_up()
            except durable.StorageError:
                raise NotFoundError(f"no file {path[:200]!r} at this moment") from None
            return super().locate(path)

    def _is_behind(self) -> bool:
        where = self.folder / "metadata" / "timestamp.json"
        try:
            return where.read_bytes() != self.timestamp()
        except OSError as error:
            raise durable.storage_error(where, error) from error

    def _catch_up(self) -> None:
        if self._is_behind():
            self._state = load(self.folder, self._state)
            self._caught_up()

    def _caught_up(self) -> None:
        """What a change by another process brings with it."""
