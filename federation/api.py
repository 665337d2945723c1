"""The operator's interface: REST over loopback, with a bearer token that has a role.

Reads and verbs over the same objects that the gRPC side uses; nothing is decided here. Errors come
as ``{"error": {"code": "...", "message": "..."}}``. OpenAPI at ``/openapi.json``.
"""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

import asyncio
import base64
import binascii
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from federation.api_answers import (
    AdaptersAnswer,
    DeviceAnswer,
    DevicesAnswer,
    EnrolmentAnswer,
    HealthAnswer,
    ReleaseAnswer,
    TokenAnswer,
)
from federation.api_bodies import (
    KeyRequest,
    ReleaseRequest,
    RevokeRequest,
    TagsRequest,
    TokenRequest,
)
from federation.api_errors import RESPONSES, add_errors
from federation.api_operators import add_operator_routes
from federation.api_rollouts import add_rollout_routes
from federation.api_trust import add_trust_routes
from federation.api_wraps import add_wrap_routes, keep_wraps
from federation.desk import Desk
from federation.filters import Filter
from federation.metadata_files import parse_metadata
from federation.metrics import CONTENT_TYPE
from federation.operators import Operator, Right, operator_of
from federation.published import ReleaseRecord
from federation.readers import barred_keys

BEHIND_HOURS = 24.0  # the life of a timestamp
BODY_SECONDS = 30.0  # that a part of a body may take
BODY_MAX = 96 * 1024 * 1024  # bytes; a release is posted in base64

Where = Annotated[str, Query(max_length=1000)]


def make_app(desk: Desk) -> FastAPI:
    """The application over one server's objects."""
    app = FastAPI(
        title="AirPEFT fleet server",
        description=__doc__,
        version="1",
        docs_url=None,
        redoc_url=None,
        responses=RESPONSES,
    )
    app.add_middleware(
        BodyLimit, refused=lambda status: desk.metrics.operators.labels(str(status)).inc()
    )
    bearer = HTTPBearer(auto_error=False)

    def operator(
        shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> Operator:
        found = operator_of(desk.store, shown.credentials) if shown else None
        if found is None:
            raise HTTPException(401, "a valid operator token is needed: see admin.token")
        return found

    def needs(right: Right) -> Any:
        def name(known: Annotated[Operator, Depends(operator)]) -> str:
            if not known.may(right):
                raise HTTPException(
                    403, f"{known.name} has the role {known.role}, which may not {right}"
                )
            return known.name

        return Annotated[str, Depends(name)]

    look, operate = needs(Right.LOOK), needs(Right.OPERATE)
    add_errors(app)
    _add_open_routes(app, desk)
    _add_fleet_routes(app, desk, look, operate)
    _add_release_routes(app, desk, look, operate)
    add_rollout_routes(app, desk, look, operate, Annotated[Operator, Depends(operator)])
    add_operator_routes(app, desk, look, needs(Right.ADMINISTER))
    add_wrap_routes(app, desk, look, operate)
    add_trust_routes(
        app,
        needs(Right.ADMINISTER),
        repository=desk.repository,
        store=desk.store,
        online=desk.online_key,
        wake=desk.wake,
    )
    return app


class BodyLimit:
    """Ends a request whose body is too long, whatever length it claims, or does not come.

    Args:
        app: answers.
        refused: told the status of every answer that is a refusal.
        seconds: that a part of the body may take.
    """

    def __init__(
        self,
        app: ASGIApp,
        refused: Callable[[int], None] = lambda status: None,
        seconds: float = BODY_SECONDS,
    ) -> None:
        self._app, self._refused, self._seconds = app, refused, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the body while it is read, and what is refused."""
        length, more = 0, True

        async def counted() -> Message:
            nonlocal length, more
            try:
                async with asyncio.timeout(self._seconds if more else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"no more of it came in {self._seconds:g} s") from None
            more = bool(message.get("more_body", False))
            length += len(message.get("body", b""))
            if length > BODY_MAX:
                raise HTTPException(413, f"the body is longer than {BODY_MAX} bytes")
            return message

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._refused(message["status"])
            await send(message)

        await self._app(scope, counted, told)


def _add_open_routes(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/health", response_model=HealthAnswer, tags=["server"])
    def health() -> dict[str, Any]:
        """Whether the server works; needs no token."""
        status = desk.status()
        trouble = desk.ticker.trouble or status.get("trouble", "")
        return {**status, "status": "serving", "trouble": trouble}

    @app.get(
        "/metrics",
        response_model=None,
        responses={200: {"content": {CONTENT_TYPE: {}}, "description": "Prometheus' text."}},
        tags=["server"],
    )
    def metrics() -> Response:
        """The server's metrics in Prometheus' text format; needs no token."""
        known = desk.fleet.devices()
        devices = Counter("revoked" if d["revoked"] else "active" for d in known)
        ages = [desk.dates.hours(d) or 0.0 for d in known if not d["revoked"]]
        desk.metrics.behind.set(sum(hours > BEHIND_HOURS for hours in ages))
        rollouts = Counter(record.rollout.state.value for record in desk.ticker.records())
        desk.metrics.round.set(desk.repository.round().sequence)
        for one in desk.repository.expiries():
            desk.metrics.expiry.labels(one.role).set(one.expires.timestamp())
        return Response(desk.metrics.render(devices, rollouts), media_type=CONTENT_TYPE)


def _add_fleet_routes(app: FastAPI, desk: Desk, look: Any, operate: Any) -> None:
    @app.post("/v1/enrolment-tokens", status_code=201, response_model=TokenAnswer, tags=["devices"])
    def make_token(body: TokenRequest, operator: operate) -> dict[str, Any]:
        """Let one device enrol, with a token that can be used once."""
        token = desk.enrolment.make_token(
            who=operator, device_id=body.device_id, tags=body.tags, seconds=body.seconds
        )
        return {
            **desk.endpoints(),
            "token": token.secret,
            "expires": token.expires,
            "authority_pem": desk.enrolment.authority_pem.decode(),
        }

    @app.post(
        "/v1/authorised-keys", status_code=201, response_model=EnrolmentAnswer, tags=["devices"]
    )
    def authorise_key(body: KeyRequest, operator: operate) -> dict[str, Any]:
        """Let the device with this key enrol, without a token."""
        expires = desk.enrolment.authorise_key(
            body.public_key.encode(),
            who=operator,
            device_id=body.device_id,
            tags=body.tags,
            seconds=body.seconds,
        )
        authority = desk.enrolment.authority_pem.decode()
        return {**desk.endpoints(), "expires": expires, "authority_pem": authority}

    def dated(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "metadata_hours": desk.dates.hours(row)}

    @app.get("/v1/devices", response_model=DevicesAnswer, tags=["devices"])
    def list_devices(
        operator: look,
        where: Where = "",
        silent_hours: Annotated[float | None, Query(ge=0)] = None,
        metadata_hours: Annotated[float | None, Query(ge=0)] = None,
    ) -> dict[str, Any]:
        """All devices, or those that a filter means.

        With ``silent_hours`` or ``metadata_hours`` only those that lag: active, and not connected
        and not seen for longer, or without newer metadata for longer.
        """
        newest = desk.repository.versions()["timestamp"]
        found = [dated(row) for row in desk.fleet.devices(_filter(where))]
        if silent_hours is not None or metadata_hours is not None:
            now = desk.store.clock()
            found = [one for one in found if _lags(one, now, silent_hours, metadata_hours)]
        return {"devices": found, "timestamp_version": newest}

    @app.get("/v1/devices/{device_id}", response_model=DeviceAnswer, tags=["devices"])
    def show_device(device_id: str, operator: look) -> dict[str, Any]:
        """One device with its newest reports."""
        return dated(desk.fleet.device(device_id))

    @app.post("/v1/devices/{device_id}/revoke", response_model=DeviceAnswer, tags=["devices"])
    def revoke_device(device_id: str, body: RevokeRequest, operator: operate) -> dict[str, Any]:
        """Never admit a device again, or one certificate of it."""
        desk.fleet.revoke(device_id, who=operator, why=body.why, serial=body.serial)
        desk.wraps.drop(barred_keys(desk.store))
        desk.wake()
        return dated(desk.fleet.device(device_id))

    @app.post("/v1/devices/{device_id}/tags", response_model=DeviceAnswer, tags=["devices"])
    def tag_device(device_id: str, body: TagsRequest, operator: operate) -> dict[str, Any]:
        """Set tags of a device; null takes one away."""
        desk.fleet.tag(device_id, body.tags, who=operator, why=body.why)
        return dated(desk.fleet.device(device_id))


def _add_release_routes(app: FastAPI, desk: Desk, look: Any, operate: Any) -> None:
    @app.get("/v1/repository/adapters", response_model=AdaptersAnswer, tags=["releases"])
    def adapters(operator: look, channel: str = "") -> dict[str, Any]:
        """The current metadata of a channel's role: what its next release is made from."""
        data = desk.repository.adapters(channel)
        version = parse_metadata(data, "adapters").signed.version
        return {
            "version": version,
            "metadata": base64.b64encode(data).decode(),
            "in_use": sorted(desk.repository.in_use()),
        }

    @app.get("/v1/releases", response_model=list[ReleaseAnswer], tags=["releases"])
    def list_releases(operator: look) -> list[dict[str, Any]]:
        """Every release that the adapter keys vouch for."""
        return [_release(record) for record in desk.repository.releases()]

    @app.post("/v1/releases", status_code=201, response_model=ReleaseAnswer, tags=["releases"])
    def publish_release(body: ReleaseRequest, operator: operate) -> dict[str, Any]:
        """Publish a signed release; sending it again changes nothing."""
        try:
            metadata = base64.b64decode(body.metadata, validate=True)
            payload = base64.b64decode(body.payload, validate=True)
        except binascii.Error as error:
            raise HTTPException(422, f"metadata and payload must be base64: {error}") from error
        now = datetime.fromtimestamp(desk.store.clock(), UTC)
        record = desk.repository.publish_release(metadata, payload, now=now)
        keep_wraps(desk, record, body.wraps)
        with desk.store.write() as connection:
            why = f"sha256 {record.sha256}, {record.length} bytes"
            desk.store.log(connection, operator, "publish", record.name, why)
        desk.wake()
        return _release(record)


def _filter(where: str) -> Filter | None:
    return Filter.parse(where) if where.strip() else None


def _release(record: ReleaseRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "target": record.target,
        "sha256": record.sha256,
        "length": record.length,
        "statement": record.statement.to_custom(),
    }


def _lags(one: dict[str, Any], now: float, silent: float | None, metadata: float | None) -> bool:
    """Whether an active device was silent, or without newer metadata, for more hours than these."""
    if one["revoked"] is not None:
        return False
    quiet = silent is not None and not one["connected"]
    return (quiet and (one["last_seen"] or 0) < now - (silent or 0) * 3600) or (
        metadata is not None and (one["metadata_hours"] or 0.0) > metadata
    )
