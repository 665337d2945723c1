"""The operator's interface for encrypted releases: to whom keys can be wrapped, and wrapped keys.

The server passes on what it can't open: content keys are wrapped by the maker of a release.
"""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

import base64
import binascii
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query

from federation.api_answers import CertificatesAnswer, WrapsAdded, WrapsAnswer
from federation.api_bodies import WrapsRequest
from federation.desk import Desk
from federation.filters import Filter
from federation.published import PublishError, ReleaseRecord
from federation.readers import active_certificates, barred_keys, read_readers
from protos.wraps import WrapError, Wraps

Where = Annotated[str, Query(max_length=1000)]


def add_wrap_routes(app: FastAPI, desk: Desk, look: Any, operate: Any) -> None:
    """Add the routes to an application.

    Args:
        app: the application.
        desk: what they speak to.
        look: the dependency that gives the name of an operator who may look.
        operate: likewise, of one who may operate.
    """

    @app.get("/v1/certificates", response_model=CertificatesAnswer, tags=["releases"])
    def certificates(operator: look, where: Where = "") -> dict[str, Any]:
        """The certificates of devices that are not revoked; their encryption keys are in them."""
        only = None
        if where.strip():
            only = {row["id"] for row in desk.fleet.devices(Filter.parse(where))}
        found = active_certificates(desk.store, only)
        return {"certificates": {name: pem.decode() for name, pem in found.items()}}

    @app.get("/v1/releases/{name}/wraps", response_model=WrapsAnswer, tags=["releases"])
    def wraps(name: str, operator: look) -> dict[str, Any]:
        """The wrapped content keys of an encrypted release."""
        record = desk.repository.release(name)
        found = desk.wraps.get(record.sha256)
        data = base64.b64encode(found.to_bytes()).decode()
        return {"sha256": record.sha256, "keys": len(found.entries), "wraps": data}

    @app.post("/v1/releases/{name}/wraps", response_model=WrapsAdded, tags=["releases"])
    def add(name: str, body: WrapsRequest, operator: operate) -> dict[str, Any]:
        """Keep further wrapped keys; those of revoked devices are left out."""
        record = desk.repository.release(name)
        added = keep_wraps(desk, record, body.wraps)
        with desk.store.write() as connection:
            desk.store.log(connection, operator, "wrap", record.name, f"{added} keys more")
        desk.wake()
        return {"added": added, "keys": len(desk.wraps.get(record.sha256).entries)}


def keep_wraps(desk: Desk, record: ReleaseRecord, data: str) -> int:
    """Keep the wrapped keys that came with a release, without revoked devices'; how many are new.

    Args:
        desk: where.
        record: the release.
        data: in base64; empty: none.

    Raises:
        HTTPException: it is no such file, or for another payload.
        PublishError: the release is not encrypted.
        StorageError: they could not be written.
    """
    if not data:
        return 0
    if record.statement.seal is None:
        raise PublishError(f"{record.name} is not encrypted: there is no key to wrap")
    try:
        more = Wraps.from_bytes(base64.b64decode(data, validate=True), record.sha256)
    except (binascii.Error, WrapError) as error:
        raise HTTPException(422, f"wraps: {error}") from error
    return desk.wraps.add(more, barred_keys(desk.store))


def lacking_key(desk: Desk, record: ReleaseRecord) -> frozenset[str]:
    """The devices to which the key of an encrypted release is not wrapped."""
    if record.statement.seal is None:
        return frozenset()
    held, found = desk.wraps.get(record.sha256), read_readers(active_certificates(desk.store))
    without = {name for name, public in found.keys.items() if held.find(public) is None}
    return frozenset({*without, *found.lacking})
