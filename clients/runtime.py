"""What an inference engine must offer a device, and the nouns that pass between them.

The rule that every engine keeps: **one request, one version**. A version is immutable; a request
carries the version that was current when it was admitted and is answered by that version alone,
however often the current one changes meanwhile (facts: a change of weights in place tears a
forward pass of another thread). Rolling back is publishing the old version again.

    version = runtime.load(adapter, name="prod-3")      # validated and prepared, not live
    previous = runtime.publish(version)                 # live: one pointer store
    runtime.run([Request("text", runtime.pin())])       # answered by what was pinned
    runtime.publish(previous)                           # back again

A batch may mix versions. This module knows no framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aggregation.adapter import Adapter
from clients.errors import ClientError

DEFAULT = "default"
BASE = "base"


class LoadError(ClientError):
    """An engine cannot run this adapter; nothing that serves has changed."""


class RequestError(ClientError):
    """A request that cannot be answered, whatever the adapter."""


@dataclass(frozen=True, eq=False)
class AdapterVersion:
    """One adapter as an engine holds it. Compared by identity: loading twice makes two versions.

    Attributes:
        name: what people call it, usually the release's name; ``base`` for the base model alone.
        digest: canonical digest of the adapter, empty for the base model alone. Caches of hidden
            states or keys and values must use this, never the name.
        labels: the classes that it scores, in the order of its head.
        state: the engine's own tensors; nobody else looks inside.
    """

    name: str
    digest: str
    labels: tuple[str, ...]
    state: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class Request:
    """One text and the version that answers it.

    Attributes:
        text: UTF-8 text; what exceeds the engine's maximum length is cut off.
        version: as pinned when the request was admitted.
    """

    text: str
    version: AdapterVersion


@dataclass(frozen=True)
class Prediction:
    """The answer to one request.

    Attributes:
        label: the class with the highest score; the first one on a tie; empty without classes.
        scores: probability by class; they sum to one.
        logits: what the scores come from, by class.
        version: the version that answered, the very one of the request.
    """

    label: str
    scores: Mapping[str, float]
    logits: Mapping[str, float]
    version: AdapterVersion


class Runtime(Protocol):
    """An engine with a base model in it. Every method may be called from any thread."""

    @property
    def kind(self) -> str:
        """The engine's name in a release's list of supported runtimes, such as ``torch``."""

    @property
    def base_digest(self) -> str:
        """Digest of the base model; adapters for another base are refused."""

    @property
    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of every module of the base that an adapter may touch, by name."""

    def load(self, adapter: Adapter, *, name: str) -> AdapterVersion:
        """Check an adapter and prepare it beside what serves, without making it live.

        Raises:
            LoadError: it is for another base, or touches what this engine cannot adapt.
        """

    def publish(self, version: AdapterVersion | None, name: str = DEFAULT) -> AdapterVersion:
        """Make a version the current one of a tenant, and hand back what was current.

        Args:
            version: what :meth:`load` gave; None for the base model alone.
            name: the tenant.
        """

    def pin(self, name: str = DEFAULT) -> AdapterVersion:
        """The version that a request admitted now must carry; the base if none is published."""

    def run(self, requests: Sequence[Request]) -> list[Prediction]:
        """Answer a batch, each request by its own version, in order.

        Raises:
            RequestError: a request of no text, or too large a batch.
        """

    def unload(self, version: AdapterVersion) -> None:
        """Let go of a version; memory is freed when its last running request has ended."""
