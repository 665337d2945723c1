"""With which identity a client signs in a secure sum, and whose signatures it believes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from clients import identity
from privacy.secure_roster import Roster, RosterError, public_bytes, seeded_identity, signer

Sign = Callable[[bytes], bytes]


@dataclass(frozen=True, kw_only=True)
class SecureIdentity:
    """Where identity and roster are: plain values, for another process of the same device.

    Attributes:
        roster: path of the file of the cohort's public keys.
        digest: what that file must hash to; empty in simulations only.
        home: home of the enrolled device, with its identity; empty in simulations only.
        seed: root seed of a simulation, from which identities derive.
    """

    roster: str
    digest: str = ""
    home: str = ""
    seed: int = 0

    def load(self, client: str) -> tuple[Sign, Roster]:
        """How this client signs, and the roster.

        Raises:
            RosterError: if the roster is missing, not the one that was pinned, or names another
                key for this client.
            IdentityError: if the device is not enrolled.
        """
        roster = Roster.read(Path(self.roster), self.digest)
        sign: Sign
        if self.home:
            device = identity.load(Path(self.home))
            key = serialization.load_pem_private_key(device.key_pem, password=None)
            sign = device.sign
            mine = key.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        else:
            drawn = seeded_identity(self.seed, client)
            sign, mine = signer(drawn), public_bytes(drawn)
        if roster.members.get(client) != mine:
            raise RosterError(
                f"{self.roster} has {'another' if client in roster.members else 'no'} key for "
                f"{client}: its signatures would count for nothing; have the roster renewed"
            )
        return sign, roster

    def to_mapping(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def of_node(
    node: Mapping[str, Any], client: str, simulated_roster: Path | None, seed: int
) -> SecureIdentity:
    """What a node's own configuration says; a server's word counts in simulations only.

    Args:
        node: ``identity`` (home of the enrolled device), ``roster`` and ``roster-digest``.
        client: the client's name.
        simulated_roster: where a simulated client finds the roster; None for real devices.
        seed: of the simulation.

    Raises:
        RosterError: if a real device lacks one of the three.
    """
    if simulated_roster is not None:
        return SecureIdentity(roster=str(simulated_roster), seed=seed)
    missing = [key for key in ("identity", "roster", "roster-digest") if not node.get(key)]
    if missing:
        raise RosterError(
            f"{client} takes part in no secure sum: its node_config has no "
            f"{' and no '.join(missing)}; it needs the home of its enrolled identity, the cohort's "
            "roster, and the roster's digest from whoever it trusts"
        )
    return SecureIdentity(
        roster=str(node["roster"]), digest=str(node["roster-digest"]), home=str(node["identity"])
    )
