"""Reading metadata files quickly: the engine's own loader, with a memory and a faster encoder.

A list of a hundred releases is 80 KB of JSON. Nearly all the time that it takes goes into reading
it and into writing it down again in canonical form, which is what signatures are made over; both
depend on the file's bytes alone. So the last few files are remembered, and canonical JSON is
written by the standard library where that gives the same bytes. Nothing is taken on trust for it:
types are checked and signatures are counted each time, with the keys of the moment.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from tuf.api import exceptions
from tuf.api.metadata import Metadata

from protos.canonical import canonical
from protos.threshold import verify_threshold

KEPT = 8  # files
LEAST = 8_192  # bytes; smaller files are read anew


class Loader:
    """Takes the place of the loader in python-tuf's ``TrustedMetadataSet``; same rules."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, tuple[Metadata[Any], bytes]] = OrderedDict()

    def __call__(
        self, role: Any, data: bytes, delegator: Any = None, role_name: str | None = None
    ) -> tuple[Any, bytes, Any]:
        """Content, signed bytes and signatures of a file, verified if there is a delegator.

        Raises:
            RepositoryError: of tuf: not metadata, of another type, or too few good signatures.
        """
        metadata, signed_bytes = self._read(data)
        if metadata.signed.type != role.type:
            raise exceptions.RepositoryError(
                f"Expected '{role.type}', got '{metadata.signed.type}'"
            )
        if delegator is not None:
            verify_threshold(delegator, role_name or role.type, signed_bytes, metadata.signatures)
            self._remember(data, metadata, signed_bytes)
        return metadata.signed, signed_bytes, metadata.signatures

    def _read(self, data: bytes) -> tuple[Metadata[Any], bytes]:
        known = self._known.get(data)
        if known is not None:
            self._known.move_to_end(data)
            return known
        metadata = Metadata[Any].from_bytes(data)
        return metadata, canonical(metadata.signed.to_dict())

    def _remember(self, data: bytes, metadata: Metadata[Any], signed_bytes: bytes) -> None:
        """Keep what has been verified; anybody could fill the memory with anything else."""
        # What delegates to others is never shared: a device takes revoked keys out of it.
        if len(data) >= LEAST and getattr(metadata.signed, "delegations", None) is None:
            self._known[data] = metadata, signed_bytes
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
