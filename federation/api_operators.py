"""REST for operators' tokens and for the audit log."""

# No "from __future__ import annotations" here: FastAPI reads the annotations of functions that
# live inside another function.

from typing import Annotated, Any

from fastapi import FastAPI, Query

from federation.api_answers import AuditLine, AuditVerdict, Named, NewOperator, OperatorAnswer
from federation.api_bodies import OperatorRequest, WhyRequest
from federation.desk import Desk
from federation.operators import add_operator, list_operators, revoke_operator

Head = Annotated[str | None, Query(pattern="^[0-9a-f]{64}$")]


def add_operator_routes(app: FastAPI, desk: Desk, look: Any, administer: Any) -> None:
    """Add the routes.

    Args:
        app: the application.
        desk: what it speaks to.
        look: annotation of the name of an operator who may look.
        administer: likewise, of one who gives out tokens.
    """

    @app.get("/v1/audit", response_model=list[AuditLine], tags=["operators"])
    def list_audit(operator: look, limit: int = 200) -> list[dict[str, Any]]:
        """The newest lines of the audit log, newest first."""
        return desk.store.audit(max(1, min(limit, 10_000)))

    @app.get("/v1/audit/verify", response_model=AuditVerdict, tags=["operators"])
    def verify_audit(operator: look, head: Head = None) -> dict[str, Any]:
        """Whether the audit log is what was written; ``head`` must still be part of it."""
        found = desk.store.verify_audit(head)
        return {**found._asdict(), "sound": found.sound}

    @app.get("/v1/operators", response_model=list[OperatorAnswer], tags=["operators"])
    def list_all_operators(operator: administer) -> list[dict[str, Any]]:
        """All operators by name; never their tokens."""
        return list_operators(desk.store)

    @app.post("/v1/operators", status_code=201, response_model=NewOperator, tags=["operators"])
    def new_operator(body: OperatorRequest, operator: administer) -> dict[str, Any]:
        """The only answer that ever holds the token."""
        token = add_operator(desk.store, body.name, body.role, who=operator, why=body.why)
        return {"name": body.name, "role": body.role, "token": token}

    @app.post("/v1/operators/{name}/revoke", response_model=Named, tags=["operators"])
    def end_operator(name: str, body: WhyRequest, operator: administer) -> dict[str, Any]:
        """Take a token back."""
        revoke_operator(desk.store, name, who=operator, why=body.why)
        return {"name": name}
