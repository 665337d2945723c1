"""Enrolling a device: a file from the operator in, a certificate in the home folder out."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from clients import health, identity
from clients.connection import enrol
from clients.device_settings import DeviceError
from clients.identity import Identity
from protos.messages import EnrolRequest

RUNTIME = "torch"  # what this software serves with


def enrol_device(home: Path, bundle: Path, *, base: str) -> Identity:
    """Use an enrolment file: make a key, ask for a certificate, keep what comes back.

    The file has a one-time token, or none where an operator has authorised this device's key.

    Asking again with the same file after an interruption is safe: key and token stay the same.

    Args:
        home: the device's home folder; made if missing.
        bundle: what ``airpeft fleet token --out`` or ``fleet authorise --out`` wrote.
        base: base model, for the inventory; it must be there.

    Raises:
        DeviceError: the file is not an enrolment file, or the device is enrolled already.
        BaseNotFound: there is no such base model.
        ConnectionLost: the server cannot be reached.
        Denied: the token is unknown, used or expired.
        StorageError: the home folder cannot be written.
    """
    from clients.base import find_base

    if (home / identity.FOLDER / "identity.json").exists():
        raise DeviceError(
            f"{home} is enrolled as {identity.load(home).device_id}: use another home folder, or "
            "remove this one to start afresh"
        )
    fields = _read_bundle(bundle)
    digest = find_base(base).digest
    key = identity.key_of(home)
    request = EnrolRequest(
        token=fields["token"],
        certificate_request=identity.certificate_request(
            key, encryption_pem=identity.encryption_key_of(home)
        ),
        inventory=health.inventory(
            agent_version=metadata.version("airpeft"), base_digest=digest, runtime=RUNTIME
        ),
    )
    reply = enrol(fields["enrol"], fields["authority_pem"].encode(), request)
    return identity.save(home, reply, key_pem=key, fleet=fields["fleet"], enrol=fields["enrol"])


def _read_bundle(path: Path) -> dict[str, str]:
    wanted = ("enrol", "fleet", "authority_pem")
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DeviceError(
            f"{path}: there is no such file; the operator makes one with "
            "'airpeft fleet token --out FILE'"
        ) from None
    except (OSError, ValueError) as error:
        raise DeviceError(f"{path} is not an enrolment file: {error}") from None
    missing = [
        key
        for key in wanted
        if not isinstance(document, dict) or not isinstance(document.get(key), str)
    ]
    if missing:
        raise DeviceError(
            f"{path} is not an enrolment file: {', '.join(missing)} missing; the operator makes "
            "one with 'airpeft fleet token --out FILE'"
        )
    token = document.get("token", "")  # none: the operator has authorised this device's key
    return {"token": str(token), **{key: document[key] for key in wanted}}
