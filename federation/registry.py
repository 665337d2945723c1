"""Every adapter that training made and that is worth keeping, by digest.

A version is one folder in PEFT's layout, readable by any PEFT user, with ``version.json`` (where
it came from, how good it is) and ``privacy.json`` (what was spent on it) beside the tensors. It
appears at once, durably, and is never changed. Putting the same adapter again changes nothing.

To register is not to release: a release is a separate act, with keys that this package never sees
while it trains (:mod:`federation.release`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from aggregation import peft_layout
from aggregation.adapter import Adapter
from federation.errors import FederationError
from federation.provenance import PRIVACY_FILE, VERSION_FILE
from protos.signed import Evaluation, Lineage, StatementError

SCHEMA = 1
PREFIX = "sha256:"

log = logging.getLogger("airpeft.federation.registry")


class RegistryError(FederationError):
    """No such version, or one whose folder is damaged."""


@dataclass(frozen=True, kw_only=True)
class AdapterVersion:
    """One registered adapter.

    Attributes:
        digest: ``sha256:<hex>`` of the adapter.
        base_digest: of the base model that it fits.
        lineage: where it came from.
        evaluation: how good it is, if that was measured.
        privacy: the privacy statement, as it stands in ``privacy.json``.
        created_unix: when it was registered, seconds since 1970, UTC.
    """

    digest: str
    base_digest: str
    lineage: Lineage = field(default_factory=Lineage)
    evaluation: Evaluation | None = None
    privacy: Mapping[str, Any] | None = None
    created_unix: int = 0


class Registry:
    """The versions in one folder.

    Args:
        folder: made at the first :meth:`put`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(
        self,
        adapter: Adapter,
        *,
        base_name: str,
        now: datetime,
        lineage: Lineage | None = None,
        evaluation: Evaluation | None = None,
        privacy: Mapping[str, Any] | None = None,
        card: str | None = None,
    ) -> AdapterVersion:
        """Keep an adapter. When this returns, a kill can't lose it.

        Args:
            adapter: what to keep.
            base_name: public name of its base model.
            now: the time, with a zone.
            lineage: where it came from.
            evaluation: how good it is.
            privacy: the privacy statement.
            card: text of ``README.md``.

        Returns:
            The version; the one that is there already if the adapter is known.

        Raises:
            StorageError: the disk refused; nothing of it is there.
        """
        folder = self.folder(adapter.digest)
        if (folder / VERSION_FILE).is_file():
            return self.get(adapter.digest)
        version = AdapterVersion(
            digest=adapter.digest,
            base_digest=adapter.spec.base_digest,
            lineage=lineage or Lineage(),
            evaluation=evaluation,
            privacy=privacy,
            created_unix=int(now.timestamp()),
        )
        extra = {VERSION_FILE: _dump(_document(version))}
        if privacy is not None:
            extra[PRIVACY_FILE] = _dump(privacy)
        peft_layout.write(folder, adapter, base_name=base_name, card=card, extra=extra)
        log.info("registered %s (run %s, round %d)", adapter.digest, *_origin(version))
        return version

    def get(self, digest: str) -> AdapterVersion:
        """One version.

        Raises:
            RegistryError: it is not here, or its folder is damaged.
        """
        folder = self.folder(digest)
        try:
            doc = json.loads((folder / VERSION_FILE).read_bytes())
            if doc["schema"] != SCHEMA or doc["digest"] != digest:
                raise ValueError(f"it describes {doc['digest']}, schema {doc['schema']}")
            measured = doc["evaluation"]
            privacy = folder / PRIVACY_FILE
            return AdapterVersion(
                digest=digest,
                base_digest=doc["base_digest"],
                lineage=Lineage.from_custom(doc["lineage"]),
                evaluation=None if measured is None else Evaluation.from_custom(measured),
                privacy=json.loads(privacy.read_bytes()) if privacy.is_file() else None,
                created_unix=doc["created_unix"],
            )
        except FileNotFoundError:
            raise RegistryError(f"no adapter {digest} in {self._folder}") from None
        except (OSError, ValueError, KeyError, TypeError, StatementError) as error:
            raise RegistryError(f"{folder / VERSION_FILE} is damaged: {error}") from None

    def adapter(self, digest: str) -> Adapter:
        """The adapter itself, checked against its digest.

        Raises:
            RegistryError: it is not here, or its tensors have changed.
            LayoutError: its folder does not read as an adapter.
        """
        self.get(digest)
        adapter = peft_layout.read(self.folder(digest))
        if adapter.digest != digest:
            raise RegistryError(f"{self.folder(digest)} holds {adapter.digest}: it was changed")
        return adapter

    def versions(self) -> tuple[AdapterVersion, ...]:
        """Every version, oldest first.

        Raises:
            RegistryError: one of them is damaged.
        """
        found = [
            self.get(PREFIX + p.parent.name)
            for p in self._folder.glob(f"*/{VERSION_FILE}")
            if len(p.parent.name) == 64
        ]
        return tuple(sorted(found, key=lambda v: (v.created_unix, v.lineage.round, v.digest)))

    def folder(self, digest: str) -> Path:
        """Where a version is or would be: a folder in PEFT's layout.

        Raises:
            RegistryError: not a digest.
        """
        name = digest.removeprefix(PREFIX)
        if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
            raise RegistryError(f"{digest[:80]!r} is not sha256:<64 hex digits>")
        return self._folder / name


def _document(version: AdapterVersion) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "digest": version.digest,
        "base_digest": version.base_digest,
        "lineage": version.lineage.to_custom(),
        "evaluation": version.evaluation.to_custom() if version.evaluation else None,
        "created_unix": version.created_unix,
    }


def _dump(doc: Mapping[str, Any]) -> bytes:
    return (json.dumps(doc, indent=2, sort_keys=True) + "\n").encode()


def _origin(version: AdapterVersion) -> tuple[str, int]:
    return version.lineage.run or "-", version.lineage.round
