"""Every refusal of the operator's interface in one shape: ``{"error": {"code", "message"}}``."""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from aggregation.durable import StorageError
from federation.api_answers import ErrorAnswer
from federation.enrolment import EnrolmentError
from federation.errors import FederationError
from federation.fleet import UnknownDeviceError
from federation.operators import OperatorsError
from federation.postgres import DatabaseAwayError
from federation.published import NotFoundError, PublishError
from federation.rollout_book import NoRolloutError
from federation.waves import RolloutError

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
CODES = {401: "unauthorised", 403: "forbidden", 404: "not-found", 405: "method", 413: "too-long"}
CODES |= {422: "invalid"}
MEANING = {
    400: "Not possible as asked.",
    401: "No valid token.",
    403: "The token's role may not do this.",
    404: "No such thing, or no such address.",
    409: "Not in this state.",
    413: "The body is too long.",
    422: "The request is not of the form described; the message names the field.",
    500: "A fault of the server; its log says more.",
    503: "The database is away; try later.",
    507: "The server's disk is full; nothing has changed.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in MEANING.items()
}
PARTS_MAX = 10  # faults of one body that are told

log = logging.getLogger("airpeft.federation.api")


def add_errors(app: FastAPI) -> None:
    """Answer every error of the application in the one shape."""

    @app.exception_handler(FederationError)
    @app.exception_handler(StorageError)
    async def _known(_request: Request, error: Exception) -> JSONResponse:
        status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 400)
        code = getattr(error, "reason", type(error).__name__.removesuffix("Error").lower())
        return _say(status, str(code), str(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path}; see /openapi.json"
        return _say(error.status_code, CODES.get(error.status_code, "http"), message)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        parts = [
            f"{'.'.join(str(one) for one in fault['loc'][1:]) or 'body'}: {fault['msg']}"
            for fault in error.errors()[:PARTS_MAX]
        ]
        return _say(422, CODES[422], "; ".join(parts))

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _say(500, "internal", f"the server failed ({type(error).__name__}): see its log")


def _say(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status)
