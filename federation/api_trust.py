"""The operator's interface for keys and revocations; what is signed is judged by the repository.

Kept apart from :mod:`federation.api`, whose routes speak of devices, releases and rollouts.
"""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

import base64
import binascii
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException
from pydantic import Field

from federation.api_answers import OfflineAnswer, RevokedAnswer, VersionsAnswer
from federation.api_bodies import Strict
from federation.keys import Signer
from federation.repository import Repository
from federation.store import Store

Base64 = Annotated[str, Field(max_length=8_000_000)]


class RevocationBody(Strict):
    """A signed ``adapters`` file that revokes something, in base64."""

    metadata: Base64


class KeysBody(Strict):
    """Signed files of a change of keys by role, in base64."""

    files: dict[str, Base64] = Field(max_length=64)
    hold: bool = False
    why: str = Field(default="", max_length=500)


def add_trust_routes(
    app: FastAPI,
    who: Any,
    *,
    repository: Repository,
    store: Store,
    online: Callable[[str], Signer],
    wake: Callable[[], None],
) -> None:
    """Add the routes to an application.

    Args:
        app: the application.
        who: the dependency that gives the operator's name.
        repository: opened with the online key.
        store: for the audit log and the time.
        online: finds an online key by its identifier.
        wake: called when devices should hear of it.
    """

    def now() -> datetime:
        return datetime.fromtimestamp(store.clock(), UTC)

    def log(operator: str, action: str, subject: str, why: str) -> None:
        with store.write() as connection:
            store.log(connection, operator, action, subject, why[:500])

    @app.get("/v1/repository/offline", response_model=OfflineAnswer, tags=["keys"])
    def offline(operator: who) -> dict[str, Any]:
        """What offline keys have signed, and when each file expires."""
        files = {r: base64.b64encode(d).decode() for r, d in repository.offline().items()}
        expiries = [
            {"role": e.role, "version": e.version, "expires": e.expires.isoformat()}
            for e in repository.expiries()
        ]
        return {"files": files, "expiries": expiries}

    @app.post("/v1/keys", response_model=VersionsAnswer, tags=["keys"])
    def change_keys(body: KeysBody, operator: who) -> dict[str, Any]:
        """Publish a signed change of keys; sending it again changes nothing."""
        files = {role: _bytes(data) for role, data in body.files.items()}
        repository.publish_keys(files, now=now(), online=online, hold=body.hold)
        log(operator, "change keys", ", ".join(sorted(files)), body.why)
        wake()
        return {"versions": dict(repository.versions())}

    @app.post("/v1/revocations", response_model=RevokedAnswer, tags=["keys"])
    def revoke_releases(body: RevocationBody, operator: who) -> dict[str, Any]:
        """Publish a signed revocation of releases; sending it again changes nothing."""
        new = repository.publish_standing(_bytes(body.metadata), now=now())
        for one in new:
            log(operator, "revoke release", one.release, one.why)
        wake()
        return {"revoked": [one.release for one in new]}


def _bytes(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise HTTPException(422, f"metadata must be base64: {error}") from error
