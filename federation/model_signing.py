"""An OpenSSF model-signing bundle beside a release: its digest is signed, its content looked at.

The bundle (OpenSSF Model Signing 1.0: a Sigstore bundle whose DSSE envelope holds an in-toto
statement) says who trained or built the files of a model folder. It is provenance, not freshness:
devices do not read it, and whether its signature is good is for ``model_signing verify`` to say,
against an identity or a key that the asker trusts. What is checked here is that it is such a bundle
and that it speaks of this very adapter, so that nobody attaches the wrong one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Any

from aggregation.peft_layout import TENSORS
from federation.errors import FederationError

MAX_BUNDLE = 4 << 20
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE = "https://model_signing/"


class BundleError(FederationError):
    """A file that is no model-signing bundle, or one for other files; says which field."""


def bundle_digest(path: Path, adapter_folder: Path) -> str:
    """``sha256:<hex>`` of a bundle that speaks of an adapter's tensors.

    Raises:
        BundleError: it can't be read, is no such bundle, or names other tensors.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BUNDLE + 1)
        tensors = hashlib.sha256((adapter_folder / TENSORS).read_bytes()).hexdigest()
    except OSError as error:
        raise BundleError(f"cannot read {error.filename or path}: {error.strerror}") from error
    if len(data) > MAX_BUNDLE:
        raise BundleError(f"{path} has more than {MAX_BUNDLE} bytes")
    named = resources(data, str(path))
    if named.get(TENSORS) != tensors:
        raise BundleError(
            f"{path} speaks of another {TENSORS} ({named.get(TENSORS, 'none')[:12]}, here is "
            f"{tensors[:12]}): sign the folder again with: model_signing sign"
        )
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def resources(data: bytes, name: str = "the bundle") -> dict[str, str]:
    """Hex SHA-256 by file name, as a bundle states them; whether it is true is not checked.

    Raises:
        BundleError: it is no model-signing bundle.
    """
    try:
        envelope = _object(json.loads(data)["dsseEnvelope"])
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise BundleError(f"{name}: payloadType is not {PAYLOAD_TYPE}")
        if not envelope["signatures"]:
            raise BundleError(f"{name} carries no signature")
        statement = _object(json.loads(base64.b64decode(envelope["payload"], validate=True)))
        if not str(statement["predicateType"]).startswith(PREDICATE):
            raise BundleError(f"{name}: predicateType does not start with {PREDICATE}")
        listed = statement["predicate"]["resources"]
        return {
            str(one["name"]).removeprefix("./"): str(one["digest"])
            for one in map(_object, listed)
            if one.get("algorithm") == "sha256"
        }
    except BundleError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        binascii.Error,
    ) as error:
        raise BundleError(f"{name} is not an OpenSSF model-signing bundle: {error!r}") from None


def _object(doc: Any) -> dict[str, Any]:
    if not isinstance(doc, dict):
        raise TypeError("an object is expected")
    return doc
