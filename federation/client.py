"""The operator's side of the REST interface, as the command line and the demo use it.

with OperatorClient.of_home(Path("fleet")) as operator:
    operator.start_rollout("stable-3", ["1", "100%"])
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

from federation.operator_link import OperatorError, OperatorLink

__all__ = ["OperatorClient", "OperatorError"]

FINAL = frozenset({"done", "rolled_back", "aborted", "paused", "draft", "awaiting_approval"})


class OperatorClient(OperatorLink):
    """What an operator may ask of one server; made as its base says."""

    def health(self) -> dict[str, Any]:
        """``{"status": "serving", "trouble": ""}``."""
        return self._call("GET", "/v1/health")

    def make_token(
        self,
        *,
        device_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        seconds: float = 24 * 3600.0,
    ) -> dict[str, Any]:
        """What a device needs to enrol: enrol, fleet, token, expires, authority_pem."""
        body = {"device_id": device_id, "tags": dict(tags or {}), "seconds": seconds}
        return self._call("POST", "/v1/enrolment-tokens", body)

    def devices(
        self,
        where: str = "",
        *,
        silent_hours: float | None = None,
        metadata_hours: float | None = None,
    ) -> list[dict[str, Any]]:
        """All devices, the revoked ones too; or those that a filter means, or that lag."""
        query = _query(where=where, silent_hours=silent_hours, metadata_hours=metadata_hours)
        return list(self._call("GET", f"/v1/devices{query}")["devices"])

    def tag(self, device_id: str, tags: Mapping[str, str | None], why: str = "") -> dict[str, Any]:
        """Set tags of a device; None takes one away."""
        body = {"tags": dict(tags), "why": why}
        return self._call("POST", f"/v1/devices/{quote(device_id, safe='')}/tags", body)

    def fleet(self) -> dict[str, Any]:
        """``{"devices": [...], "timestamp_version": newest}``."""
        return self._call("GET", "/v1/devices")

    def device(self, device_id: str) -> dict[str, Any]:
        """One device with its newest reports."""
        return self._call("GET", f"/v1/devices/{quote(device_id, safe='')}")

    def revoke(self, device_id: str, why: str = "", serial: str | None = None) -> dict[str, Any]:
        """Never admit this device again; or only this certificate of it."""
        body = {"why": why, "serial": serial}
        return self._call("POST", f"/v1/devices/{quote(device_id, safe='')}/revoke", body)

    def authorise_key(
        self,
        public_key: str,
        *,
        device_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        seconds: float = 90 * 86400.0,
    ) -> dict[str, Any]:
        """What a device with this key needs to enrol: enrol, fleet, expires, authority_pem."""
        body = {
            "public_key": public_key,
            "device_id": device_id,
            "tags": dict(tags or {}),
            "seconds": seconds,
        }
        return self._call("POST", "/v1/authorised-keys", body)

    def adapters(self, channel: str = "") -> tuple[int, bytes]:
        """Version and bytes of the metadata that a channel's next release is made from."""
        answer = self._call("GET", f"/v1/repository/adapters?channel={quote(channel, safe='')}")
        return int(answer["version"]), base64.b64decode(answer["metadata"])

    def in_use(self) -> list[str]:
        """Targets that the current round hands out."""
        return list(self._call("GET", "/v1/repository/adapters")["in_use"])

    def publish_release(
        self, metadata: bytes, payload: bytes, wraps: bytes = b""
    ) -> dict[str, Any]:
        """Send a signed release, with its wrapped keys if it is encrypted; again is no harm."""
        body = {
            "metadata": base64.b64encode(metadata).decode(),
            "payload": base64.b64encode(payload).decode(),
            "wraps": base64.b64encode(wraps).decode(),
        }
        return self._call("POST", "/v1/releases", body)

    def certificates(self, where: str = "") -> dict[str, bytes]:
        """The certificates (PEM) of devices that are not revoked, or of those a filter means."""
        query = f"?{urlencode({'where': where})}" if where else ""
        answer = self._call("GET", f"/v1/certificates{query}")
        return {name: pem.encode() for name, pem in answer["certificates"].items()}

    def wraps(self, release: str) -> bytes:
        """The wrapped content keys of an encrypted release, as a file."""
        answer = self._call("GET", f"/v1/releases/{quote(release, safe='')}/wraps")
        return base64.b64decode(answer["wraps"])

    def add_wraps(self, release: str, wraps: bytes) -> dict[str, Any]:
        """Send further wrapped keys; those that are there stay as they are."""
        body = {"wraps": base64.b64encode(wraps).decode()}
        return self._call("POST", f"/v1/releases/{quote(release, safe='')}/wraps", body)

    def publish_revocation(self, metadata: bytes) -> dict[str, Any]:
        """Send a signed revocation; sending it again changes nothing."""
        body = {"metadata": base64.b64encode(metadata).decode()}
        return self._call("POST", "/v1/revocations", body)

    def offline(self) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        """The files that offline keys have signed, by role, and when every file expires."""
        answer = self._call("GET", "/v1/repository/offline")
        files = {role: base64.b64decode(data) for role, data in answer["files"].items()}
        return files, list(answer["expiries"])

    def change_keys(
        self, files: Mapping[str, bytes], *, hold: bool = False, why: str = ""
    ) -> dict[str, Any]:
        """Send a signed change of keys; sending it again changes nothing."""
        wire = {role: base64.b64encode(data).decode() for role, data in files.items()}
        return self._call("POST", "/v1/keys", {"files": wire, "hold": hold, "why": why})

    def releases(self) -> list[dict[str, Any]]:
        """Every release that the adapter keys vouch for."""
        return self._list("/v1/releases")

    def start_rollout(
        self,
        release: str,
        waves: Sequence[str] = ("1", "100%"),
        *,
        policy: Mapping[str, Any] | None = None,
        why: str = "",
        draft: bool = False,
        other: str | None = None,
    ) -> dict[str, Any]:
        """Start a rollout, or a comparison with ``other``; or only draft it."""
        body = {
            "release": release,
            "other": other,
            "waves": list(waves),
            "policy": dict(policy or {}),
            "why": why,
            "draft": draft,
        }
        return self._call("POST", "/v1/rollouts", body)

    def plan_rollout(
        self,
        release: str,
        waves: Sequence[str] = ("1", "100%"),
        *,
        policy: Mapping[str, Any] | None = None,
        other: str | None = None,
    ) -> dict[str, Any]:
        """What a rollout would do to how many devices; nothing changes."""
        body = {
            "release": release,
            "other": other,
            "waves": list(waves),
            "policy": dict(policy or {}),
        }
        return self._call("POST", "/v1/rollouts/plan", body)

    def rollouts(self, state: Sequence[str] = (), release: str = "") -> list[dict[str, Any]]:
        """All rollouts, newest first; or those in these states, or of this release."""
        return self._list(f"/v1/rollouts{_query(state=list(state), release=release)}")

    def rollout(
        self, rollout_id: str, *, where: str = "", troubled: bool = False
    ) -> dict[str, Any]:
        """One rollout, with what each device said, or those devices that were asked for."""
        query = _query(where=where, troubled="true" if troubled else "")
        return self._call("GET", f"/v1/rollouts/{quote(rollout_id, safe='')}{query}")

    def act(self, rollout_id: str, verb: str, why: str = "") -> dict[str, Any]:
        """start, approve, pause, resume, abort or rollback."""
        path = f"/v1/rollouts/{quote(rollout_id, safe='')}/{verb}"
        return self._call("POST", path, {"why": why})

    def watch(
        self,
        rollout_id: str,
        pause: Callable[[], object],
        seen: Callable[[dict[str, Any]], None],
        *,
        patience: float = 0.0,
        away: Callable[[str], None] = lambda why: None,
    ) -> dict[str, Any]:
        """Follow a rollout until it rests.

        Args:
            rollout_id: which.
            pause: called between two looks.
            seen: called with the rollout whenever it changed.
            patience: seconds for which the server may give no answer, while it starts anew.
            away: called with the reason, once each time that it gives none.

        Returns:
            The rollout at rest: done, rolled_back, aborted, paused, draft or awaiting_approval.
        """
        last: dict[str, Any] = {}
        since: float | None = None
        while True:
            try:
                now = self.rollout(rollout_id)
            except OperatorError as error:
                if not last or error.status:
                    raise
                if since is None:
                    since = time.monotonic()
                    away(str(error))
                elif time.monotonic() - since > patience:
                    raise
                pause()
                continue
            since = None
            if now != last:
                seen(now)
                last = now
            if now["state"] in FINAL:
                return now
            pause()

    def audit(self, limit: int = 200) -> list[dict[str, Any]]:
        """The newest audit lines, newest first."""
        return self._list(f"/v1/audit?limit={limit}")

    def verify_audit(self, head: str | None = None) -> dict[str, Any]:
        """Whether the audit log is whole; ``head``: a digest that must still be part of it."""
        query = f"?{urlencode({'head': head})}" if head else ""
        return self._call("GET", f"/v1/audit/verify{query}")

    def operators(self) -> list[dict[str, Any]]:
        """All operators by name."""
        return self._list("/v1/operators")

    def add_operator(self, name: str, role: str, why: str = "") -> dict[str, Any]:
        """Give out a token; this answer alone holds it."""
        return self._call("POST", "/v1/operators", {"name": name, "role": role, "why": why})

    def revoke_operator(self, name: str, why: str = "") -> dict[str, Any]:
        """Take a token back."""
        return self._call("POST", f"/v1/operators/{quote(name, safe='')}/revoke", {"why": why})

    def metrics(self) -> str:
        """The server's metrics in Prometheus' text format."""
        return self._send("GET", "/metrics", None).text


def _query(**given: Any) -> str:
    """A query string of what is given; a list is repeated."""
    kept = {name: value for name, value in given.items() if value not in (None, "", [])}
    return f"?{urlencode(kept, doseq=True)}" if kept else ""
