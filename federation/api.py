"""The operator's interface: REST over loopback, with a bearer token.

Reads and verbs over the same objects that the gRPC side uses; nothing is decided here. Errors come
as ``{"error": {"code": "...", "message": "..."}}``. OpenAPI at ``/openapi.json``.
"""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

import base64
import binascii
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aggregation.durable import StorageError
from federation.api_bodies import ReleaseRequest, RolloutRequest, TokenRequest, WhyRequest
from federation.api_trust import add_trust_routes
from federation.enrolment import Enrolment, EnrolmentError
from federation.errors import FederationError
from federation.fleet import Fleet, UnknownDeviceError
from federation.keys import Signer
from federation.metadata_files import parse_metadata
from federation.metrics import CONTENT_TYPE, Metrics
from federation.operators import operator_of
from federation.policy import Policy
from federation.published import NotFoundError, PublishError, ReleaseRecord
from federation.repository import Repository
from federation.rollout import Rollout, Verb
from federation.store import Store
from federation.ticker import NoRolloutError, RolloutRecord, Ticker
from federation.waves import RolloutError, Wave

BODY_MAX = 96 * 1024 * 1024  # bytes; a release is posted in base64

STATUS: dict[type[Exception], int] = {
    NotFoundError: 404,
    NoRolloutError: 404,
    UnknownDeviceError: 404,
    RolloutError: 409,
    PublishError: 409,
    EnrolmentError: 409,
    StorageError: 507,
}


@dataclass(frozen=True, kw_only=True)
class Desk:
    """All that the interface speaks to.

    Attributes:
        endpoints: where devices enrol and connect, ``{"enrol": "host:port", "fleet": ...}``.
        wake: called (from any thread) when streams should look again.
        online_key: finds an online key by its identifier, for a change of keys.
    """

    store: Store
    fleet: Fleet
    enrolment: Enrolment
    ticker: Ticker
    repository: Repository
    metrics: Metrics
    endpoints: Callable[[], dict[str, str]]
    wake: Callable[[], None]
    online_key: Callable[[str], Signer]


def make_app(desk: Desk) -> FastAPI:
    """The application over one server's objects."""
    app = FastAPI(title="AirPEFT fleet server", version="1", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    bearer = HTTPBearer(auto_error=False)

    def operator(
        shown: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    ) -> str:
        name = operator_of(desk.store, shown.credentials) if shown else None
        if name is None:
            raise HTTPException(401, "a valid operator token is needed: see admin.token")
        return name

    Who = Annotated[str, Depends(operator)]
    _add_errors(app)
    _add_open_routes(app, desk)
    _add_fleet_routes(app, desk, Who)
    _add_release_routes(app, desk, Who)
    _add_rollout_routes(app, desk, Who)
    add_trust_routes(
        app,
        Who,
        repository=desk.repository,
        store=desk.store,
        online=desk.online_key,
        wake=desk.wake,
    )
    return app


class BodyLimit:
    """Ends a request whose body is too long, whatever length it claims."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the body while it is read."""
        length = 0

        async def counted() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > BODY_MAX:
                raise HTTPException(413, f"the body is longer than {BODY_MAX} bytes")
            return message

        await self._app(scope, counted, send)


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
        return {"status": "serving", "trouble": desk.ticker.trouble}

    @app.get("/metrics")
    def metrics() -> Response:
        devices = Counter("revoked" if d["revoked"] else "active" for d in desk.fleet.devices())
        rollouts = Counter(record.rollout.state.value for record in desk.ticker.records())
        desk.metrics.round.set(desk.repository.round().sequence)
        for one in desk.repository.expiries():
            desk.metrics.expiry.labels(one.role).set(one.expires.timestamp())
        return Response(desk.metrics.render(devices, rollouts), media_type=CONTENT_TYPE)


def _add_fleet_routes(app: FastAPI, desk: Desk, who: Any) -> None:
    @app.post("/v1/enrolment-tokens", status_code=201)
    def make_token(body: TokenRequest, operator: who) -> dict[str, Any]:
        token = desk.enrolment.make_token(
            who=operator, device_id=body.device_id, tags=body.tags, seconds=body.seconds
        )
        return {
            **desk.endpoints(),
            "token": token.secret,
            "expires": token.expires,
            "authority_pem": desk.enrolment.authority_pem.decode(),
        }

    @app.get("/v1/devices")
    def devices(operator: who) -> dict[str, Any]:
        newest = desk.repository.versions()["timestamp"]
        return {"devices": desk.fleet.devices(), "timestamp_version": newest}

    @app.get("/v1/devices/{device_id}")
    def device(device_id: str, operator: who) -> dict[str, Any]:
        return desk.fleet.device(device_id)

    @app.post("/v1/devices/{device_id}/revoke")
    def revoke(device_id: str, body: WhyRequest, operator: who) -> dict[str, Any]:
        desk.fleet.revoke(device_id, who=operator, why=body.why)
        desk.wake()
        return desk.fleet.device(device_id)

    @app.get("/v1/audit")
    def audit(operator: who, limit: int = 200) -> list[dict[str, Any]]:
        return desk.store.audit(max(1, min(limit, 10_000)))


def _add_release_routes(app: FastAPI, desk: Desk, who: Any) -> None:
    @app.get("/v1/repository/adapters")
    def adapters(operator: who, channel: str = "") -> dict[str, Any]:
        """The current metadata of a channel's role: what its next release is made from."""
        data = desk.repository.adapters(channel)
        version = parse_metadata(data, "adapters").signed.version
        return {
            "version": version,
            "metadata": base64.b64encode(data).decode(),
            "in_use": sorted(desk.repository.in_use()),
        }

    @app.get("/v1/releases")
    def releases(operator: who) -> list[dict[str, Any]]:
        return [_release(record) for record in desk.repository.releases()]

    @app.post("/v1/releases", status_code=201)
    def publish(body: ReleaseRequest, operator: who) -> dict[str, Any]:
        try:
            metadata = base64.b64decode(body.metadata, validate=True)
            payload = base64.b64decode(body.payload, validate=True)
        except binascii.Error as error:
            raise HTTPException(422, f"metadata and payload must be base64: {error}") from error
        now = datetime.fromtimestamp(desk.store.clock(), UTC)
        record = desk.repository.publish_release(metadata, payload, now=now)
        with desk.store.write() as connection:
            why = f"sha256 {record.sha256}, {record.length} bytes"
            desk.store.log(connection, operator, "publish", record.name, why)
        desk.wake()
        return _release(record)


def _add_rollout_routes(app: FastAPI, desk: Desk, who: Any) -> None:
    @app.post("/v1/rollouts", status_code=201)
    def start(body: RolloutRequest, operator: who) -> dict[str, Any]:
        waves = [Wave.parse(wave) for wave in body.waves]
        policy = Policy(**body.policy.model_dump())
        begin = desk.ticker.create if body.draft else desk.ticker.start
        rollout = begin(body.release, waves, policy, who=operator, why=body.why)
        return status(rollout.id, operator)

    @app.get("/v1/rollouts")
    def rollouts(operator: who) -> list[dict[str, Any]]:
        return [_rollout(record) for record in desk.ticker.records()]

    @app.get("/v1/rollouts/{rollout_id}")
    def status(rollout_id: str, operator: who) -> dict[str, Any]:
        record = desk.ticker.record(rollout_id)
        return {**_rollout(record), "devices": _devices(desk, record.rollout)}

    @app.post("/v1/rollouts/{rollout_id}/{verb}")
    def act(rollout_id: str, verb: Verb, body: WhyRequest, operator: who) -> dict[str, Any]:
        desk.ticker.act(rollout_id, verb, who=operator, why=body.why)
        return status(rollout_id, operator)


def _devices(desk: Desk, rollout: Rollout) -> list[dict[str, Any]]:
    words = {(one["device_id"], one["release"]): one for one in desk.fleet.outcomes(rollout.id)}
    rows = []
    for one in desk.fleet.observations(rollout):
        word = words.get((one.device_id, rollout.release.release), {})
        rows.append(
            {
                "device_id": one.device_id,
                "in_wave": rollout.wave >= 0 and rollout.includes(one.device_id),
                "running": one.running,
                "outcome": one.outcome,
                "reason": one.reason,
                "quality": asdict(one.quality) if one.quality else None,
                "detail": word.get("detail", ""),
                "payload_bytes": word.get("payload_bytes", 0),
            }
        )
    return rows


def _rollout(record: RolloutRecord) -> dict[str, Any]:
    return {
        **record.rollout.to_mapping(),
        "created": record.created,
        "updated": record.updated,
    }


def _release(record: ReleaseRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "target": record.target,
        "sha256": record.sha256,
        "length": record.length,
        "statement": record.statement.to_custom(),
    }
