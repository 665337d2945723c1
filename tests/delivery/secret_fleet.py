"""A fleet on loopback whose releases are encrypted; its devices are real but for the engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregation import payload, peft_layout, sealed
from clients import identity
from clients.connection import Connection, enrol
from clients.identity import Identity
from clients.sources import Sources
from federation import release
from federation.published import ReleaseRecord
from federation.readers import active_certificates, barred_keys, read_readers
from federation.release import ReleaseOptions
from federation.sealing import SealTo, load_sealing_key, make_sealing_key, more_wraps
from federation.sealing import read_sealing_public as read_public
from federation.wrap_shelf import WrapShelf
from protos.messages import EnrolRequest, RejectReason
from protos.recipients import public_half
from protos.signed import ReleaseStatement, Seal
from protos.wraps import Wraps
from simulations.light_device import BASE_DIGEST, light_adapter, light_agent
from tests.device.world import HOST, Gateway
from tests.waiting import until

RANK = 16  # a payload of several chunks


class SecretFleet:
    """A gateway, the keys of its releases, and one sealing key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gateway = Gateway(folder / "server")
        self.repository = self.gateway.repository
        self.shelf = WrapShelf(self.repository.folder)
        self.sealing = folder / "sealing.pem"
        self.public = read_public(make_sealing_key(self.sealing, None))
        self.adapter = light_adapter(1, rank=RANK)
        peft_layout.write(folder / "adapter", self.adapter, base_name="light")
        self.plain = payload.encode(self.adapter)
        self.gateway.start()

    def enrol(self, name: str, *, encryption: bool = True) -> Path:
        """A device's home; without an encryption key, as older agents enrolled."""
        home = self.folder / name
        home.mkdir()
        key = identity.key_of(home)
        secret = identity.encryption_key_of(home) if encryption else b""
        token = self.gateway.enrolment.make_token(who="test", device_id=name).secret
        wanted = identity.certificate_request(key, encryption_pem=secret)
        request = EnrolRequest(token=token, certificate_request=wanted)
        at = f"{HOST}:{self.gateway.enrol_port}"
        reply = enrol(at, self.gateway.authority.pem, request)
        identity.save(home, reply, key_pem=key, fleet=f"{HOST}:{self.gateway.port}", enrol=at)
        self.gateway.fleet.refresh(name)
        return home

    def readers(self) -> dict[str, bytes]:
        return dict(read_readers(active_certificates(self.gateway.store)).keys)

    def make(self, number: int) -> Path:
        """A request for an encrypted release, to all who are enrolled now."""
        out = self.folder / f"request-{number}"
        release.make_request(
            self.folder / "adapter",
            out,
            adapters=self.repository.adapters("stable"),
            options=ReleaseOptions(channel="stable", runtime=("numpy",)),
            now=datetime.now(UTC),
            seal_to=SealTo((self.public,), self.readers()),
        )
        return out

    def publish(self, number: int = 1) -> ReleaseRecord:
        """The same, signed, published and handed out to everybody."""
        out = self.make(number)
        for signer in self.gateway.publisher.adapter_keys[:2]:
            release.sign(out, signer)
        record = release.publish(out, self.repository, now=datetime.now(UTC))
        self.gateway.order(record, rollout=f"r{number}")
        return record

    def publish_bytes(
        self, data: bytes, key: bytes, recipients: Sequence[bytes], **changes: Any
    ) -> ReleaseRecord:
        """Whatever bytes, properly signed: what two bad signers could do."""
        statement = ReleaseStatement(
            channel="stable",
            counter=len(self.repository.releases()) + 1,
            adapter_digest=self.plain.adapter_digest,
            spec_digest=self.adapter.spec.digest,
            base_digest=BASE_DIGEST,
            plain_length=self.plain.plain_length,
            runtime=("numpy",),
            seal=changes.get("seal", Seal(check=sealed.key_check(key))),
        )
        metadata = self.gateway.publisher.signed_adapters(statement, data)
        record = self.repository.publish_release(metadata, data, now=datetime.now(UTC))
        self.shelf.add(Wraps.to(key, record.sha256, recipients))
        self.gateway.order(record, rollout=statement.name)
        return record

    def wrap(self, record: ReleaseRecord) -> int:
        """What ``airpeft release wrap`` does."""
        seal = record.statement.seal
        assert seal is not None
        held, private = self.shelf.get(record.sha256), load_sealing_key(self.sealing, None)
        new = more_wraps(held, seal, private, self.readers().values())
        return self.shelf.add(new, barred_keys(self.gateway.store))

    def revoke(self, name: str) -> None:
        """What the operator's interface does."""
        self.gateway.fleet.revoke(name, who="test", why="stolen")
        self.shelf.drop(barred_keys(self.gateway.store))

    def refusal(self, name: str, release_name: str) -> RejectReason | None:
        """Why a device has refused a release, once it has said so."""

        def said() -> RejectReason | None:
            for report in self.gateway.reports(name):
                if report.release == release_name and report.reason is not None:
                    return report.reason
            return None

        return until(said, what=f"{name} to refuse {release_name}")


def public_of(home: Path) -> bytes:
    return public_half(identity.load(home).encryption_pem)


@contextmanager
def running(home: Path, sources: Sources | None = None, connect: Any = Connection) -> Any:
    """A device at work in this process; hands out its engine."""

    def dial(who: Identity) -> Connection:
        return connect(who)  # type: ignore[no-any-return]

    agent, runtime = light_agent(home, sources=sources, connect=dial, wait=0.05)
    agent.start()
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield runtime
    finally:
        agent.stop()
        thread.join(120)
        assert not thread.is_alive()


def serves(runtime: Any, name: str) -> bool:
    until(lambda: runtime.pin().name == name, what=f"{name} to serve")
    return True


def is_there(folder: Path, needle: bytes) -> bool:
    """Whether a piece of plaintext lies anywhere below a folder."""
    return any(needle in file.read_bytes() for file in folder.rglob("*") if file.is_file())
