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

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregation.durable import StorageError
from federation.api_bodies import (
    KeyRequest,
    ReleaseRequest,
    RevokeRequest,
    TagsRequest,
    TokenRequest,
)
from federation.api_operators import add_operator_routes
from federation.api_rollouts import add_rollout_routes
from federation.api_trust import add_trust_routes
from federation.api_wraps import add_wrap_routes, keep_wraps
from federation.desk import Desk
from federation.enrolment import EnrolmentError
from federation.errors import FederationError
from federation.filters import Filter
from federation.fleet import UnknownDeviceError
from federation.metadata_files import parse_metadata
from federation.metrics import CONTENT_TYPE
from federation.operators import Operator, OperatorsError, Right, operator_of
from federation.postgres import DatabaseAwayError
from federation.published import NotFoundError, PublishError, ReleaseRecord
from federation.readers import barred_keys
from federation.rollout_book import NoRolloutError
from federation.waves import RolloutError

BEHIND_HOURS = 24.0  # the life of a timestamp
BODY_SECONDS = 30.0  # that a part of a body may take
BODY_MAX = 96 * 1024 * 1024  # bytes; a release is posted in base64

STATUS: dict[type[Exception], int] = {
    NotFoundError: 404,
    NoRolloutError: 404,
    UnknownDeviceError: 404,
    RolloutError: 409,
    PublishError: 409,
    EnrolmentError: 409,
    OperatorsError: 409,
    DatabaseAwayError: 503,
    StorageError: 507,
}


Where = Annotated[str, Query(max_length=1000)]


def make_app(desk: Desk) -> FastAPI:
    """The application over one server's objects."""
    app = FastAPI(title="AirPEFT fleet server", version="1", docs_url=None, redoc_url=None)
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
    _add_errors(app)
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


def _add_errors(app: FastAPI) -> None:
    def say(status: int, code: str, message: str) -> JSONResponse:
        return JSONResponse({"error": {"code": code, "message": message}}, status)

    @app.exception_handler(FederationError)
    @app.exception_handler(StorageError)
    async def _known(_request: Request, error: Exception) -> JSONResponse:
        status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 400)
        code = getattr(error, "reason", type(error).__name__.removesuffix("Error").lower())
        return say(status, str(code), str(error))

    @app.exception_handler(HTTPException)
    async def _http(_request: Request, error: HTTPException) -> JSONResponse:
        return say(error.status_code, "http", str(error.detail))


def _add_open_routes(app: FastAPI, desk: Desk) -> None:
    @app.get("/v1/health")
    def health() -> dict[str, Any]:
        status = desk.status()
        trouble = desk.ticker.trouble or status.get("trouble", "")
        return {**status, "status": "serving", "trouble": trouble}

    @app.get("/metrics")
    def metrics() -> Response:
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
    @app.post("/v1/enrolment-tokens", status_code=201)
    def make_token(body: TokenRequest, operator: operate) -> dict[str, Any]:
        token = desk.enrolment.make_token(
            who=operator, device_id=body.device_id, tags=body.tags, seconds=body.seconds
        )
        return {
            **desk.endpoints(),
            "token": token.secret,
            "expires": token.expires,
            "authority_pem": desk.enrolment.authority_pem.decode(),
        }

    @app.post("/v1/authorised-keys", status_code=201)
    def authorise_key(body: KeyRequest, operator: operate) -> dict[str, Any]:
        expires = desk.enrolment.authorise_key(
            body.public_key.encode(),
            who=operator,
            device_id=body.device_id,
            tags=body.tags,
            seconds=body.seconds,
        )
        authority = desk.enrolment.authority_pem.decode()
        return {**desk.endpoints(), "expires": expires, "authority_pem": authority}

    @app.get("/v1/devices")
    def devices(operator: look, where: Where = "") -> dict[str, Any]:
        newest = desk.repository.versions()["timestamp"]
        rows = desk.fleet.devices(_filter(where))
        found = [{**row, "metadata_hours": desk.dates.hours(row)} for row in rows]
        return {"devices": found, "timestamp_version": newest}

    @app.get("/v1/devices/{device_id}")
    def device(device_id: str, operator: look) -> dict[str, Any]:
        found = desk.fleet.device(device_id)
        return {**found, "metadata_hours": desk.dates.hours(found)}

    @app.post("/v1/devices/{device_id}/revoke")
    def revoke(device_id: str, body: RevokeRequest, operator: operate) -> dict[str, Any]:
        desk.fleet.revoke(device_id, who=operator, why=body.why, serial=body.serial)
        desk.wraps.drop(barred_keys(desk.store))
        desk.wake()
        return desk.fleet.device(device_id)

    @app.post("/v1/devices/{device_id}/tags")
    def tag(device_id: str, body: TagsRequest, operator: operate) -> dict[str, Any]:
        desk.fleet.tag(device_id, body.tags, who=operator, why=body.why)
        return desk.fleet.device(device_id)


def _add_release_routes(app: FastAPI, desk: Desk, look: Any, operate: Any) -> None:
    @app.get("/v1/repository/adapters")
    def adapters(operator: look, channel: str = "") -> dict[str, Any]:
        """The current metadata of a channel's role: what its next release is made from."""
        data = desk.repository.adapters(channel)
        version = parse_metadata(data, "adapters").signed.version
        return {
            "version": version,
            "metadata": base64.b64encode(data).decode(),
            "in_use": sorted(desk.repository.in_use()),
        }

    @app.get("/v1/releases")
    def releases(operator: look) -> list[dict[str, Any]]:
        return [_release(record) for record in desk.repository.releases()]

    @app.post("/v1/releases", status_code=201)
    def publish(body: ReleaseRequest, operator: operate) -> dict[str, Any]:
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
