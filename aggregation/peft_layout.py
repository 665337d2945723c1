"""Adapters as PEFT folders: what ``PeftModel.from_pretrained`` reads, and what it wrote.

A folder that we write holds ``adapter_config.json`` (sorted), ``adapter_model.safetensors``,
``airpeft.json`` (the canonical specification) and, if given, ``README.md`` (a model card). It is
written from the tensors and the specification alone, so it is the same bytes everywhere.

Reading never trusts the configuration further than a few checked fields: with ``airpeft.json``
everything is compared with it; without, shapes come from the tensors and only ranks, alphas,
orientation and the settings of the PEFT type from the configuration. No pattern is ever compiled,
nothing is imported, ``.bin`` is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aggregation import durable, peft_config, peft_types, tensor_file
from aggregation.adapter import Adapter, AdapterError
from aggregation.errors import AggregationError
from aggregation.spec import AdapterSpec
from aggregation.spec_from_peft import spec_from_peft, tensors_from_peft

CONFIG, TENSORS, SPEC, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "airpeft.json",
    "README.md",
)
MAX_CONFIG = 4 << 20
MAX_TENSOR_BYTES = 2 << 30


class LayoutError(AdapterError):
    """A folder that is not a readable PEFT adapter."""


def write(
    folder: Path,
    adapter: Adapter,
    *,
    base_name: str,
    card: str | None = None,
    extra: Mapping[str, bytes] | None = None,
    with_spec: bool = True,
) -> None:
    """Write an adapter as a PEFT folder, all at once and durably; an old folder is replaced.

    Args:
        folder: where.
        adapter: what.
        base_name: public name of the base model (a hub name), never a path.
        card: text of ``README.md``.
        extra: further files by name, for example a privacy statement.
        with_spec: whether ``airpeft.json`` is written; leave it out where the digest of the base
            is not known.

    Raises:
        LayoutError: if ``base_name`` is a path, or an extra file has a taken or unsafe name.
        StorageError: if the folder cannot be written; an old folder is then still there.
    """
    files = contents(adapter, base_name, with_spec=with_spec)
    if card is not None:
        files[CARD] = card.encode()
    for name, data in (extra or {}).items():
        if name in files or Path(name).is_absolute() or ".." in Path(name).parts:
            raise LayoutError(f"extra file {name!r} has a name that is taken or leaves the folder")
        files[name] = data
    durable.write_folder(folder, files)


def contents(adapter: Adapter, base_name: str, *, with_spec: bool = True) -> dict[str, bytes]:
    """The files of a PEFT folder by name, as :func:`write` writes them.

    Raises:
        LayoutError: if ``base_name`` is a path.
    """
    if looks_like_path(base_name):
        raise LayoutError(
            f"base_name {base_name!r} looks like a path; give the model's public name"
        )
    config = peft_config.peft_config(adapter.spec, base_name)
    files = {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS: tensor_file.save(
            {peft_types.file_key(adapter.spec, key): value for key, value in adapter}, "pt"
        ),
    }
    return files | ({SPEC: (adapter.spec.to_json() + "\n").encode()} if with_spec else {})


def looks_like_path(base_name: str) -> bool:
    """Whether a name of a base model is a place on somebody's machine."""
    return base_name.startswith((".", "/", "~")) or "\\" in base_name


def base_of(folder: Path) -> tuple[str, str | None]:
    """The base model that a folder was made for.

    Returns:
        What its configuration calls it, empty if it does not say; and the digest that its
        ``airpeft.json`` gives, None without one.

    Raises:
        LayoutError: if there is no readable configuration.
    """
    try:
        name = _json(_read(folder / CONFIG, MAX_CONFIG)).get("base_model_name_or_path")
        digest = None
        if (folder / SPEC).is_file():
            digest = AdapterSpec.from_json(_read(folder / SPEC, MAX_CONFIG)).base_digest
    except AggregationError as error:
        raise LayoutError(f"{folder}: {error}") from None
    return (name if isinstance(name, str) else ""), digest


def read(folder: Path, *, base_digest: str | None = None) -> Adapter:
    """Read a PEFT folder.

    Args:
        folder: one that :func:`write` made, or any that peft's ``save_pretrained`` made.
        base_digest: ``sha256:<hex>`` of the base model. Needed for a folder without
            ``airpeft.json``; with one, it is compared.

    Returns:
        The adapter; tensors of other float types are widened or rounded to float32.

    Raises:
        LayoutError: naming the folder and the file, tensor or field that is wrong.
    """
    try:
        config = _json(_read(folder / CONFIG, MAX_CONFIG))
        found, _ = tensor_file.load(_tensor_bytes(folder))
        tensors = tensors_from_peft(config, found)
        if (folder / SPEC).is_file():
            spec = AdapterSpec.from_json(_read(folder / SPEC, MAX_CONFIG))
            if base_digest not in (None, spec.base_digest):
                raise LayoutError(
                    f"{SPEC} is for base {spec.base_digest}, not {base_digest}: use an adapter "
                    "that was trained on this base"
                )
            _compare(config, spec)
        elif base_digest is None:
            raise LayoutError(f"there is no {SPEC}, so base_digest must be given")
        else:
            shapes = {name: value.shape for name, value in tensors.items()}
            spec = spec_from_peft(config, shapes, base_digest)
        adapter = Adapter(spec, tensors)
    except LayoutError as error:
        raise LayoutError(f"{folder}: {error}") from None
    except AggregationError as error:
        raise LayoutError(f"{folder}: {error}") from error
    if not adapter.is_finite():
        bad = next(name for name, value in adapter if not np.isfinite(value).all())
        raise LayoutError(f"{folder}: tensor {bad} has values that are NaN or infinite")
    return adapter


def _compare(config: Mapping[str, Any], spec: AdapterSpec) -> None:
    for name, expected in peft_config.meaning(spec).items():
        given = config.get(name, peft_config.DEFAULTS.get(name))
        if isinstance(given, list) and isinstance(expected, list):
            given, expected = sorted(map(str, given)), sorted(expected)  # peft writes sets
        if given != expected:
            raise LayoutError(
                f"{CONFIG}: {name} is {given!r}, but {SPEC} says {expected!r}; "
                f"remove {SPEC} if the configuration is right"
            )


def _tensor_bytes(folder: Path) -> bytes:
    path = folder / TENSORS
    if not path.is_file() and (folder / "adapter_model.bin").exists():
        raise LayoutError(
            "adapter_model.bin is a pickle and is never loaded; save the adapter again with "
            "safe_serialization=True"
        )
    return _read(path, MAX_TENSOR_BYTES)


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise LayoutError(
            f"{path.name}: {error.strerror}; expected a PEFT adapter folder"
        ) from None
    if len(data) > limit:
        raise LayoutError(f"{path.name} is larger than {limit} bytes")
    return data


def _json(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{CONFIG} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise LayoutError(f"{CONFIG} is not a JSON object")
    return document
