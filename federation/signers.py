"""Signers that are not key files of ours: an external command, a PKCS#11 token; named by a URI.

Both go through securesystemslib's signer interface. ``command:`` is ours, and runs a program that
reads what is to be signed from its standard input and writes the raw signature to its standard
output (Ed25519: 64 bytes; ECDSA: DER), so that a key may lie in any vault that has a command::

    command:openssl dgst -sha256 -sign vault/adapters-1.key
    command:/usr/local/bin/sign-with-kms --key projects/x/adapters-2

The words are split as a shell splits them, but no shell runs them. A PKCS#11 token is named as RFC
7512 does, or as securesystemslib does::

    pkcs11:token=YubiKey%20PIV;id=%02?module-path=/usr/lib/x86_64-linux-gnu/libykcs11.so
    hsm:2?label=YubiKey+PIV

It needs the extra ``airpeft[pkcs11]``. Whatever signs, its signature is verified with the public
half before it is used. A PIN comes from the caller, by prompt, environment or file.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from urllib.parse import parse_qs, quote_plus, unquote, unquote_to_bytes

from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import (  # type: ignore[attr-defined]  # it has no __all__
    SIGNER_FOR_URI_SCHEME,
    HSMSigner,
    Key,
    SecretsHandler,
    Signature,
    Signer,
    SSlibKey,
)

from federation.errors import FederationError

SCHEMES = ("command", "hsm", "pkcs11")
DEADLINE = 120.0  # seconds that a command may take: a person may have to touch a token
MAX_SIGNATURE = 1_024  # bytes
MODULE_VARIABLE = "PYKCS11LIB"
_URI = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII)


class SignerError(FederationError):
    """A signer that can't be used or did not sign; says which and what to do."""


class CommandSigner(Signer):
    """Signs with a program of the user's.

    Args:
        uri: ``command:PROGRAM ARGUMENTS...``.
        public_key: the public half of the key that the program signs with.
        deadline: seconds that one signature may take.
    """

    SCHEME = "command"

    def __init__(self, uri: str, public_key: Key, *, deadline: float = DEADLINE) -> None:
        try:
            words = shlex.split(uri.removeprefix(f"{self.SCHEME}:"))
        except ValueError as error:
            raise SignerError(f"{uri!r} is not a command: {error}") from None
        if not words:
            raise SignerError(f"{uri!r} names no program: command:PROGRAM ARGUMENTS...")
        self._words, self._key, self._deadline = words, public_key, deadline

    @property
    def public_key(self) -> Key:
        """The public half."""
        return self._key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> CommandSigner:
        """See :class:`securesystemslib.signer.Signer`; the program asks for its own secrets."""
        return cls(priv_key_uri, public_key)

    def sign(self, payload: bytes) -> Signature:
        """Run the program once.

        Raises:
            SignerError: it can't be started, fails, takes too long, or writes no signature.
        """
        program = self._words[0]
        environment = {**os.environ, "AIRPEFT_KEYID": self._key.keyid}
        try:
            # Its standard error is the user's: that is where it may ask for a PIN or a touch.
            done = subprocess.run(
                self._words,
                input=payload,
                stdout=subprocess.PIPE,
                timeout=self._deadline,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise SignerError(
                f"{program} gave no signature within {self._deadline:g} seconds"
            ) from None
        except OSError as error:
            raise SignerError(f"cannot run {program}: {error.strerror}") from error
        if done.returncode != 0:
            raise SignerError(f"{program} ended with status {done.returncode}, and did not sign")
        if not 0 < len(done.stdout) <= MAX_SIGNATURE:
            raise SignerError(
                f"{program} wrote {len(done.stdout)} bytes; a raw signature is expected"
            )
        return Signature(self._key.keyid, done.stdout.hex())


class CheckedSigner(Signer):
    """Any signer, its signatures verified before they leave: a wrong key is found here, early."""

    def __init__(self, inner: Signer, what: str) -> None:
        self._inner, self._what = inner, what

    @property
    def public_key(self) -> Key:
        """The public half."""
        return self._inner.public_key

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> CheckedSigner:
        """See :class:`securesystemslib.signer.Signer`."""
        inner = Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler)
        return cls(inner, priv_key_uri.partition(" ")[0])

    def sign(self, payload: bytes) -> Signature:
        """Sign, and verify.

        Raises:
            SignerError: it did not sign, or with another key.
        """
        try:
            signature = self._inner.sign(payload)
        except SignerError:
            raise
        except Exception as error:  # each vendor's library has errors of its own
            raise SignerError(f"{self._what} did not sign: {error!r}") from error
        try:
            self.public_key.verify_signature(signature, payload)
        except Exception as error:
            raise SignerError(
                f"{self._what} signed, but not with {self.public_key.keyid[:12]}: {error}; "
                "is the .pub.json the public half of this key?"
            ) from None
        return signature


def check_no_secret(uri: str) -> None:
    """Refuse a URI with a PIN in it: command lines and files of keys are read by others.

    Raises:
        SignerError: it has one; the message does not repeat it.
    """
    scheme, _, rest = uri.partition(":")
    if scheme in ("pkcs11", "hsm") and re.search(r"(?i)(?:^|[;?&])\s*pin-(?:value|source)\b", rest):
        raise SignerError(
            f"{scheme}: a PIN does not go into the URI, where others can read it: leave pin-value "
            "and pin-source out, and give it by prompt, by environment or by --passphrase-file"
        )


def is_uri(text: str) -> bool:
    """Whether a text names a signer by URI.

    >>> is_uri("command:cat"), is_uri("keys/adapters-1.pem")
    (True, False)
    """
    match = _URI.match(text)
    return match is not None and match[1] in {*SCHEMES, *SIGNER_FOR_URI_SCHEME}


def open_signer(uri: str, public_key: Key, secret: Callable[[str], str]) -> Signer:
    """A signer by its URI, ready to sign.

    Args:
        uri: see the top of this module.
        public_key: the public half.
        secret: asked for a PIN, if one is needed, with its name.

    Raises:
        SignerError: an unknown scheme, a malformed URI, or the library for it is not installed.
    """
    scheme = uri.partition(":")[0]
    if scheme not in SCHEMES:
        raise SignerError(f"signer {scheme!r} is not one of {', '.join(SCHEMES)}")
    check_no_secret(uri)
    try:
        return CheckedSigner.from_priv_key_uri(_as_hsm(uri), public_key, secret)
    except UnsupportedLibraryError as error:
        raise SignerError(_no_library(uri, error)) from None
    except (ValueError, TypeError) as error:
        raise SignerError(f"{uri}: {error}") from None


def import_token(uri: str, secret: Callable[[str], str]) -> tuple[str, SSlibKey]:
    """The public half of a key on a PKCS#11 token, and the URI to keep.

    Raises:
        SignerError: no such token or key, or the library for it is not installed.
    """
    check_no_secret(uri)
    hsm = _as_hsm(uri)
    number, _, query = hsm.removeprefix("hsm:").partition("?")
    label = parse_qs(query).get("label", [None])[0]
    try:
        found, key = HSMSigner.import_(int(number) if number else None, label, secret)
    except UnsupportedLibraryError as error:
        raise SignerError(_no_library(uri, error)) from None
    except Exception as error:
        raise SignerError(f"{uri}: {error}") from error
    return (uri if uri.startswith("pkcs11:") else found), key


def _no_library(uri: str, error: Exception) -> str:
    return (
        f"{uri.partition(':')[0]}: needs a library that is not installed ({error}): "
        "pip install 'airpeft[pkcs11]', or use a command: signer"
    )


def _as_hsm(uri: str) -> str:
    """A ``pkcs11:`` URI (RFC 7512) as securesystemslib names it; others unchanged.

    >>> _as_hsm("pkcs11:token=YubiKey%20PIV;id=%02")
    'hsm:2?label=YubiKey+PIV'
    """
    if not uri.startswith("pkcs11:"):
        return uri
    path, _, query = uri.removeprefix("pkcs11:").partition("?")
    pairs = dict(part.partition("=")[::2] for part in path.split(";") if part)
    unknown = sorted(pairs.keys() - {"token", "id", "object", "type"})
    if unknown:
        raise SignerError(f"{uri}: {', '.join(unknown)} is not understood; token and id are")
    module = parse_qs(query).get("module-path")
    if module:
        os.environ[MODULE_VARIABLE] = module[0]
    number = int.from_bytes(unquote_to_bytes(pairs["id"]), "big") if pairs.get("id") else ""
    label = f"?label={quote_plus(unquote(pairs['token']))}" if pairs.get("token") else ""
    return f"hsm:{number}{label}"


SIGNER_FOR_URI_SCHEME[CommandSigner.SCHEME] = CommandSigner
