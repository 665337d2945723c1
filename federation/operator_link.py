"""How the operator's side reaches a server: address, token, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import ipaddress
import json
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from federation.errors import FederationError
from federation.homes import endpoint_files


class OperatorError(FederationError):
    """The server answered no, or not at all. ``status`` is the HTTP status, 0 without an answer."""

    def __init__(self, message: str, status: int = 0, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class OperatorLink:
    """A connection to one server.

    Args:
        url: such as ``http://127.0.0.1:8443``.
        token: the operator's.
        timeout: seconds for each call.

    Raises:
        OperatorError: an address at which anybody on the way could read the token.
    """

    def __init__(self, url: str, token: str, *, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        if not _keeps_secrets(self.url):
            raise OperatorError(
                f"{self.url[:200]}: the operator's token would go out for anybody to read: give "
                "https://HOST[:PORT], or http:// on loopback only (ssh -L brings a port here)"
            )
        # Loopback, or an address the operator gave: proxies of the environment have no part in it.
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout,
            trust_env=False,
        )

    @classmethod
    def of_home(cls, home: Path) -> Self:
        """For a server on this machine, by its home folder.

        Raises:
            OperatorError: the server isn't running, or its token file is gone.
        """
        address = _served_at(home)
        try:
            token = (home / "admin.token").read_text().strip()
        except OSError as error:
            raise OperatorError(
                f"cannot read the operator's token {home / 'admin.token'}: {error.strerror};"
                " give --url and --token-file instead"
            ) from error
        return cls(address, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        return dict(self._send(method, path, body).json())

    def _list(self, path: str) -> list[dict[str, Any]]:
        return list(self._send("GET", path, None).json())

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise OperatorError(
                f"no answer from {self.url}: {error or type(error).__name__}; is the server"
                " running? start it with: airpeft server --home DIR"
            ) from error
        if answer.is_success:
            return answer
        raise _refusal(answer)


def _refusal(answer: httpx.Response) -> OperatorError:
    try:
        document = answer.json()
        error = document.get("error", {})
        message, code = error.get("message", ""), str(error.get("code", ""))
    except (ValueError, AttributeError, TypeError, KeyError):
        message, code = answer.text[:500], ""
    return OperatorError(message or f"HTTP {answer.status_code}", answer.status_code, code)


def _keeps_secrets(url: str) -> bool:
    """Whether what is sent there is encrypted, or stays on this machine.

    >>> [_keeps_secrets(u) for u in ("https://a.example", "http://127.0.0.1:1", "http://[::1]:1")]
    [True, True, True]
    >>> [_keeps_secrets(u) for u in ("http://a.example", "http://127.0.0.1@a.example", "a:1", "")]
    [False, False, False, False]
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "https":
            return bool(parts.hostname)
        host = parts.hostname or ""
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    return parts.scheme == "http" and here


def _served_at(home: Path) -> str:
    """Address of the server of a home; of the first gateway that answers, where there are some.

    Raises:
        OperatorError: none is running there.
    """
    files = endpoint_files(home)
    addresses = []
    for path in files:
        try:
            addresses.append(f"http://{json.loads(path.read_bytes())['api']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OperatorError(f"cannot read {path}: {error}") from error
    for address in addresses[:-1]:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{address}/v1/health", timeout=5.0, trust_env=False).is_success:
                return address
    if addresses:
        return addresses[-1]
    raise OperatorError(
        f"no server is running in {home}: start it with: airpeft server --home {home}"
    )
