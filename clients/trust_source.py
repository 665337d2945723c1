"""Where metadata comes from while it is verified: a pushed bundle, or files fetched one by one.

A source knows nothing of trust. What it hands out is judged by :mod:`clients.trust_metadata`, which
also says how many bytes a file may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from clients.errors import ClientError
from protos.messages import RejectReason

MAX_FILES = 128
MAX_FILE_BYTES = 5_000_000
MAX_TIMESTAMP_BYTES = 16_384
MAX_ROOT_BYTES = 512_000
MAX_ROOTS = 1_024


class Refused(ClientError):  # noqa: N818  (named as devices report it)
    """Metadata that must not be acted on, with its reason from the closed vocabulary."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail


class Source(Protocol):
    """Files of a repository by name, and what was believed of it before."""

    def remote(self, name: str, limit: int) -> bytes | None:
        """A file as its carrier has it now; None if there is none.

        Args:
            name: such as ``2.root.json`` or ``timestamp.json``.
            limit: bytes that it may have at most.

        Raises:
            Refused: it is larger, or cannot be had.
        """

    def local(self, role: str) -> bytes | None:
        """The file of a role that was believed last; None if nothing is remembered."""

    def keep(self, role: str, data: bytes) -> None:
        """Remember a role's file: it is believed now."""


class BundleSource:
    """A pushed bundle. It remembers nothing: a device's marks do (:mod:`clients.trust_state`).

    Args:
        files: by name, from anywhere.

    Raises:
        Refused: too many files, or one that is too large.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if len(files) > MAX_FILES + MAX_ROOTS:
            raise Refused(RejectReason.METADATA_MALFORMED, f"the bundle has {len(files)} files")
        for name, data in files.items():
            _check_size(name, data, limit_of(name))
        self._files = files

    def remote(self, name: str, limit: int) -> bytes | None:
        """A file of the bundle."""
        data = self._files.get(name)
        if data is not None:
            _check_size(name, data, limit)
        return data

    def local(self, role: str) -> bytes | None:
        """Nothing: each bundle is whole."""
        return None

    def keep(self, role: str, data: bytes) -> None:
        """Nothing: the marks are kept elsewhere."""


def limit_of(name: str) -> int:
    """Bytes that a file of this name may have, where nothing that is signed says less."""
    if name == "timestamp.json":
        return MAX_TIMESTAMP_BYTES
    return MAX_ROOT_BYTES if name.endswith(".root.json") else MAX_FILE_BYTES


def _check_size(name: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        raise Refused(
            RejectReason.METADATA_MALFORMED,
            f"{name[:60]} has {len(data)} bytes; at most {limit} are read",
        )
