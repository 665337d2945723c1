"""Keys as people read them: who holds what, what is due, and who has signed a change so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from federation.circles import ONLINE, ROOT, Circle
from federation.cli_support import Format, show_json, show_table
from federation.key_change import Offline
from federation.key_request import KeyRequest, progress, read_change
from federation.keys import key_holder, key_name
from federation.plain_text import plain
from federation.roles import lifetime
from protos.signed import REVOKED_KEYS, ROUNDS_ROLE

SOON = 3  # a file is due when less than a third of its life is left
BY_ITSELF = ("timestamp", "snapshot", ROUNDS_ROLE)


def holdings(
    files: Mapping[str, bytes], expiries: Sequence[Mapping[str, Any]], now: datetime
) -> dict[str, Any]:
    """Circles with their keys, files with their expiry and what is to be done about them.

    Args:
        files: what offline keys have signed, by role.
        expiries: role, version and expiry of every file.
        now: the time, with a zone.
    """
    offline = Offline.parse(files)
    revoked = offline.root.unrecognized_fields.get(REVOKED_KEYS, [])
    return {
        "circles": [_circle(circle) for circle in offline.circles().values()],
        "files": [_file(one, now) for one in expiries],
        "revoked_keys": list(revoked),
    }


def _circle(circle: Circle) -> dict[str, Any]:
    return {
        "circle": circle.name,
        "signs": {ROOT: "root, targets", ONLINE: "snapshot, timestamp, rounds"}.get(
            circle.name, f"releases of {', '.join(circle.paths)}"
        ),
        "threshold": circle.threshold,
        "keys": [
            {
                "name": key_name(key),
                "holder": key_holder(key),
                "keyid": keyid,
                "scheme": getattr(key, "scheme", ""),
            }
            for keyid, key in circle.keys.items()
        ],
    }


def _file(one: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    role, expires = str(one["role"]), datetime.fromisoformat(str(one["expires"]))
    left = expires - now
    due = ""
    if left.total_seconds() <= 0:
        due = "EXPIRED: devices install nothing new"
    elif role in BY_ITSELF:
        due = "" if left > lifetime(role) / 8 else "the server should have dated it: does it run?"
    elif left < lifetime(role) / SOON:
        due = "renew: airpeft keys renew"
    return {**one, "days_left": round(left.total_seconds() / 86_400, 1), "due": due}


def show_holdings(
    output: Format,
    files: Mapping[str, bytes],
    expiries: Sequence[Mapping[str, Any]],
    *,
    now: datetime,
) -> None:
    """Print who holds what and what is due."""
    found = holdings(files, expiries, now)
    if output is Format.JSON:
        show_json("holdings", found)
        return
    show_table(
        ["circle", "needed", "key", "holder", "keyid", "signs"],
        [
            [
                c["circle"] if not n else "",
                f"{c['threshold']} of {len(c['keys'])}" if not n else "",
                key["name"],
                key["holder"] or "-",
                key["keyid"][:16],
                c["signs"] if not n else "",
            ]
            for c in found["circles"]
            for n, key in enumerate(c["keys"])
        ],
    )
    typer.echo("")
    show_table(
        ["file", "version", "expires", "days left", "due"],
        [
            [f["role"], f["version"], str(f["expires"])[:16], f["days_left"], f["due"] or "-"]
            for f in found["files"]
        ],
    )
    if found["revoked_keys"]:
        listed = ", ".join(keyid[:12] for keyid in found["revoked_keys"])
        typer.echo(f"\nrevoked keys, which count no more: {listed}")


def change_data(change: Path | KeyRequest, signatures: Sequence[Path] = ()) -> dict[str, Any]:
    """A request to change keys: what changes, and who has signed."""
    request = change if isinstance(change, KeyRequest) else read_change(change)
    return {
        "request": str(request.folder),
        "why": request.why,
        "changes": request.lines(),
        "needs": [
            {
                "file": f"{need.role}.json",
                "circle": f"{need.circle.name}{' before the change' if need.old else ''}",
                "signed_by": list(need.signed_by),
                "missing": need.missing,
                "may_sign": [n for n in need.circle.names if n not in need.signed_by],
            }
            for need in progress(request, signatures)
        ],
    }


def show_progress(
    output: Format, change: Path | KeyRequest, signatures: Sequence[Path] = ()
) -> None:
    """Print a request to change keys."""
    data = change_data(change, signatures)
    if output is Format.JSON:
        show_json("key-change", data)
        return
    if data["why"]:
        typer.echo(f"why: {plain(data['why'])}")
    for line in data["changes"]:
        typer.echo(f"  {plain(line)}")
    typer.echo("")
    show_table(
        ["file", "keys of", "signed by", "missing", "may sign"],
        [
            [
                n["file"],
                n["circle"],
                ", ".join(n["signed_by"]) or "-",
                n["missing"],
                ", ".join(n["may_sign"]) if n["missing"] else "-",
            ]
            for n in data["needs"]
        ],
    )
