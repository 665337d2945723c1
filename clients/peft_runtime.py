"""The torch engine: versions of any PEFT type beside one frozen base, which is never touched.

PEFT itself is not used here: its set_adapter, hotswap and merge change layers one by one, and a
forward pass of another thread then sees some layers of the old adapter and some of the new. Here
the base never changes. Every linear layer of the encoder carries hooks, installed once; they read a
context variable that says which version each row of this batch has, and apply what that version
does at this layer (``clients.runtime_forms``). Rows whose version puts tokens before the text go
through in a pass of their own. Publishing is one pointer store, and a version dies with the last
request that holds it.

Before any release the base version answers: its head is zero, so every class has the same score.

    runtime = PeftRuntime(find_base("minilm"), labels=("negative", "positive"))

Logits equal those of ``PeftModel`` on the same adapter (a test holds them together).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aggregation.adapter import Adapter
from clients.base import BaseRef
from clients.model import build, tokenizer
from clients.runtime import (
    BASE,
    DEFAULT,
    AdapterVersion,
    LoadError,
    Prediction,
    Request,
    RequestError,
)
from clients.runtime_forms import HEAD, State, make_state

MAX_LENGTH = 128  # tokens
MAX_REQUESTS = 4096
BATCH = 16  # rows of one forward pass: small, so that probes and served requests interleave


@dataclass(frozen=True, eq=False)
class _Group:
    """The rows of one batch that belong to one version; ``rows`` is None for all of them."""

    state: State
    labels: int
    rows: Tensor | None


_groups: ContextVar[tuple[_Group, ...]] = ContextVar("airpeft_groups", default=())


class PeftRuntime:
    """A :class:`clients.runtime.Runtime` on torch. Safe for any number of threads, without a lock.

    Args:
        base: the base model.
        labels: classes that the base version answers with, all equal; may be empty.
        max_length: tokens of a text that are looked at.
        batch: rows of one forward pass.

    Raises:
        BaseUnsupported: the base cannot be loaded.
    """

    kind = "torch"

    def __init__(
        self,
        base: BaseRef,
        *,
        labels: Sequence[str] = (),
        max_length: int = MAX_LENGTH,
        batch: int = BATCH,
    ) -> None:
        self._ref, self._batch = base, batch
        self._model = build(base, max(1, len(labels)))
        self._encode = _encoder(base, min(max_length, base.positions))
        shapes = {}
        for name, module in self._model.named_modules():
            if name == HEAD:
                module.register_forward_hook(_head_hook)
            elif isinstance(module, nn.Linear):
                shapes[name] = (module.out_features, module.in_features)
                module.register_forward_pre_hook(_before(name))
                module.register_forward_hook(_after(name))
        self._shapes = shapes
        self._base = AdapterVersion(BASE, "", tuple(labels), State())
        self._live: dict[str, AdapterVersion] = {}
        self._writing = threading.Lock()  # between publishers only; readers take none

    @property
    def base_digest(self) -> str:
        """Digest of the base model."""
        return self._ref.digest

    @property
    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        """(d_out, d_in) of every linear layer of the encoder."""
        return self._shapes

    def load(self, adapter: Adapter, *, name: str) -> AdapterVersion:
        """See :meth:`clients.runtime.Runtime.load`."""
        state = make_state(adapter, name, self._model, self._ref)
        return AdapterVersion(name, adapter.digest, adapter.spec.labels, state)

    def publish(self, version: AdapterVersion | None, name: str = DEFAULT) -> AdapterVersion:
        """See :meth:`clients.runtime.Runtime.publish`."""
        if version is not None and not isinstance(version.state, State):
            raise LoadError(f"{version.name}: loaded by another engine")
        with self._writing:
            previous = self.pin(name)
            live = dict(self._live)
            live[name] = version or self._base
            self._live = live  # the one pointer store
        return previous

    def pin(self, name: str = DEFAULT) -> AdapterVersion:
        """See :meth:`clients.runtime.Runtime.pin`."""
        return self._live.get(name, self._base)

    def unload(self, version: AdapterVersion) -> None:
        """See :meth:`clients.runtime.Runtime.unload`."""
        with self._writing:
            self._live = {k: v for k, v in self._live.items() if v is not version}

    def run(self, requests: Sequence[Request]) -> list[Prediction]:
        """See :meth:`clients.runtime.Runtime.run`."""
        out: list[Prediction | None] = [None] * len(requests)
        if len(requests) > MAX_REQUESTS:
            raise RequestError(f"{len(requests)} requests at once, at most {MAX_REQUESTS}")
        if any(not isinstance(r.text, str) or not r.text.strip() for r in requests):
            raise RequestError("a request has no text")
        tokens = self._encode([request.text for request in requests])
        # Rows of similar length together: less padding, less work.
        order = sorted(range(len(requests)), key=lambda i: len(tokens[i]))
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            chosen = [requests[i] for i in rows]
            logits = self._forward([tokens[i] for i in rows], [r.version for r in chosen])
            for i, request, row in zip(rows, chosen, logits, strict=True):
                out[i] = _prediction(request.version, row)
        return [prediction for prediction in out if prediction is not None]

    def _forward(self, tokens: list[list[int]], versions: list[AdapterVersion]) -> Tensor:
        """Logits, (n, most labels of any version), one row per text; -inf beyond a row's own."""
        width = max(len(ids) for ids in tokens)
        ids = torch.zeros((len(tokens), width), dtype=torch.long)
        mask = torch.zeros((len(tokens), width), dtype=torch.long)
        for row, found in enumerate(tokens):
            ids[row, : len(found)] = torch.tensor(found)
            mask[row, : len(found)] = 1
        parts: dict[int, list[int]] = {}
        for row, version in enumerate(versions):
            parts.setdefault(id(version) if version.state.virtual else 0, []).append(row)
        if len(parts) == 1:
            return self._pass(ids, mask, versions)
        passed = []
        for rows in parts.values():
            longest = int(mask[rows].sum(1).max())
            part = self._pass(
                ids[rows, :longest], mask[rows, :longest], [versions[row] for row in rows]
            )
            passed.append((rows, part))
        widest = max(part.shape[1] for _, part in passed)
        logits = torch.full((len(tokens), widest), float("-inf"))
        for rows, part in passed:
            logits[rows, : part.shape[1]] = part
        return logits

    def _pass(self, ids: Tensor, mask: Tensor, versions: list[AdapterVersion]) -> Tensor:
        """Logits of rows that go through together: of one version, if it has virtual tokens."""
        state: State = versions[0].state
        inputs: dict[str, Any] = {"input_ids": ids, "past_key_values": state.prefix}
        token = _groups.set(_group(versions))
        try:
            with torch.inference_mode():
                if state.prompt is not None:
                    room = self._ref.positions - state.virtual
                    ids, mask = ids[:, :room], mask[:, :room]
                    words = self._model.encoder.embeddings.word_embeddings(ids)
                    prompt = state.prompt.expand(len(ids), -1, -1)
                    inputs = {"inputs_embeds": torch.cat([prompt, words], dim=1)}
                before = mask.new_ones((len(mask), state.virtual))
                logits: Tensor = self._model(
                    attention_mask=torch.cat([before, mask], dim=1), **inputs
                )
                return logits
        finally:
            _groups.reset(token)


def _before(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed: Tensor | None = None
        for group in _groups.get():
            layer = group.state.layers.get(name)
            if layer is None or layer.before is None:
                continue
            if group.rows is None:
                return (args[0] * layer.before, *args[1:])
            if changed is None:
                changed = args[0].clone()
            changed[group.rows] *= layer.before
        return None if changed is None else (changed, *args[1:])

    return multiply


def _after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    def change(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        changed: Tensor | None = None
        for group in _groups.get():
            layer = group.state.layers.get(name)
            if layer is None:
                continue
            if group.rows is None:
                return layer.after(args[0], output)
            if changed is None:
                changed = output.clone()
            changed[group.rows] = layer.after(args[0][group.rows], output[group.rows])
        return changed

    return change


def _head_hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    groups = _groups.get()
    if not groups:
        return None
    pooled: Tensor = args[0]  # (n, hidden)
    width = max(1, *(group.labels for group in groups))
    logits = pooled.new_full((pooled.shape[0], width), float("-inf"))
    for group in groups:
        rows = torch.arange(pooled.shape[0]) if group.rows is None else group.rows
        if group.state.weight is None or group.state.bias is None:
            logits[rows, : max(1, group.labels)] = 0.0
        else:
            own = pooled[rows] @ group.state.weight.T + group.state.bias
            logits[rows, : group.labels] = own
    return logits


def _group(versions: Sequence[AdapterVersion]) -> tuple[_Group, ...]:
    members: dict[int, list[int]] = {}
    by_id = {id(version): version for version in versions}
    for row, version in enumerate(versions):
        members.setdefault(id(version), []).append(row)
    whole = len(members) == 1
    return tuple(
        _Group(
            by_id[key].state,
            len(by_id[key].labels),
            None if whole else torch.tensor(rows),
        )
        for key, rows in members.items()
    )


def _prediction(version: AdapterVersion, row: Tensor) -> Prediction:
    own = row[: len(version.labels)].double()
    logits = dict(zip(version.labels, own.tolist(), strict=True))
    scores = dict(zip(version.labels, torch.softmax(own, dim=-1).tolist(), strict=True))
    label = max(scores, key=lambda key: scores[key]) if scores else ""
    return Prediction(label, scores, logits, version)


def _encoder(base: BaseRef, max_length: int) -> Callable[[list[str]], list[list[int]]]:
    """Token ids of texts, from any thread.

    A private copy of the tokeniser, its settings fixed once: the library's own wrapper changes
    them in every call, which threads cannot share.
    """
    from tokenizers import Tokenizer

    path = base.path / "tokenizer.json"
    if path.is_file():
        fast = Tokenizer.from_file(str(path))
    else:
        fast = Tokenizer.from_str(tokenizer(base).backend_tokenizer.to_str())
    fast.no_padding()
    fast.enable_truncation(max_length=max_length)
    return lambda texts: [encoding.ids for encoding in fast.encode_batch(texts)]
