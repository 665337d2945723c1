"""REST for operators' tokens and for the audit log."""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

from typing import Any

from fastapi import FastAPI

from federation.api_bodies import OperatorRequest, WhyRequest
from federation.desk import Desk
from federation.operators import add_operator, list_operators, revoke_operator


def add_operator_routes(app: FastAPI, desk: Desk, look: Any, administer: Any) -> None:
    """Add the routes.

    Args:
        app: the application.
        desk: what it speaks to.
        look: annotation of the name of an operator who may look.
        administer: likewise, of one who gives out tokens.
    """

    @app.get("/v1/audit")
    def audit(operator: look, limit: int = 200) -> list[dict[str, Any]]:
        return desk.store.audit(max(1, min(limit, 10_000)))

    @app.get("/v1/audit/verify")
    def verify(operator: look, head: str | None = None) -> dict[str, Any]:
        found = desk.store.verify_audit(head)
        return {**found._asdict(), "sound": found.sound}

    @app.get("/v1/operators")
    def operators(operator: administer) -> list[dict[str, Any]]:
        return list_operators(desk.store)

    @app.post("/v1/operators", status_code=201)
    def add(body: OperatorRequest, operator: administer) -> dict[str, Any]:
        """The only answer that ever holds the token."""
        token = add_operator(desk.store, body.name, body.role, who=operator, why=body.why)
        return {"name": body.name, "role": body.role, "token": token}

    @app.post("/v1/operators/{name}/revoke")
    def revoke(name: str, body: WhyRequest, operator: administer) -> dict[str, Any]:
        revoke_operator(desk.store, name, who=operator, why=body.why)
        return {"name": name}
