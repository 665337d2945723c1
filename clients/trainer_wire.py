"""How a trainer is spoken to over a Unix socket: frames of a JSON header and packed numbers.

    frame = b"APT1" | header length, 4 bytes | body length, 8 bytes | header | body

Big-endian lengths, bounded before anything is read. The body holds the adapters' float32 values,
one after the other, in the order in which the header names them. Nothing in a frame is executed.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aggregation.adapter import Adapter
from aggregation.spec import AdapterSpec
from aggregation.update import Update
from clients.data import DataSource, Examples
from clients.errors import ClientError
from clients.faults import JobFailure, JobFault
from clients.training import ClientJob, TrainingPlan
from privacy.budget import LocalPrivacy

MAGIC = b"APT1"
MAX_HEADER = 256 << 20
MAX_BODY = 1 << 30
_PREFIX = struct.Struct(">4sIQ")


class TrainerError(ClientError):
    """The resident trainer cannot be reached, or said something that is not its language."""


def send(connection: socket.socket, header: Mapping[str, Any], adapters: Sequence[Adapter]) -> None:
    """Send one frame.

    Raises:
        TrainerError: if it is larger than a frame may be.
    """
    head = json.dumps({**header, "adapters": [_named(a) for a in adapters]}).encode()
    body = b"".join(a.pack().astype("<f4", copy=False).tobytes() for a in adapters)
    if len(head) > MAX_HEADER or len(body) > MAX_BODY:
        raise TrainerError("the request is too large: send fewer jobs at once, and data by path")
    connection.sendall(_PREFIX.pack(MAGIC, len(head), len(body)) + head + body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[Adapter]]:
    """Receive one frame.

    Raises:
        TrainerError: if the other side closed early or sent something else.
        AdapterError, SpecError: if an adapter does not fit its specification.
    """
    magic, head_length, body_length = _PREFIX.unpack(_exactly(connection, _PREFIX.size))
    if magic != MAGIC or head_length > MAX_HEADER or body_length > MAX_BODY:
        raise TrainerError("the other side of the socket is not an AirPEFT trainer")
    try:
        header = json.loads(_exactly(connection, head_length))
        named = [(AdapterSpec.from_json(a["spec"]), a["digest"]) for a in header["adapters"]]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"a malformed header: {error!r}") from None
    values = np.frombuffer(_exactly(connection, body_length), "<f4")
    if values.size != sum(spec.size for spec, _ in named):
        raise TrainerError("the body does not hold what the header announces")
    adapters, start = [], 0
    for spec, digest in named:
        adapter = Adapter.unpack(spec, values[start : start + spec.size])
        if adapter.digest != digest:
            raise TrainerError("an adapter arrived with another digest than announced")
        adapters.append(adapter)
        start += spec.size
    return header, adapters


def job_header(job: ClientJob) -> dict[str, Any]:
    """A job without its adapter."""
    return {
        "client": job.client,
        "run": job.run,
        "round": job.round,
        "data": data_header(job.data),
        "plan": job.plan.to_mapping(),
        "privacy": job.privacy.to_mapping() if job.privacy else None,
        "seed": job.seed,
    }


def job_from(header: Mapping[str, Any], adapter: Adapter) -> ClientJob:
    """The inverse of :func:`job_header`."""
    privacy = header["privacy"]
    return ClientJob(
        client=str(header["client"]),
        run=str(header["run"]),
        round=int(header["round"]),
        adapter=adapter,
        data=data_from(header["data"]),
        plan=TrainingPlan.from_mapping(header["plan"]),
        privacy=LocalPrivacy.from_mapping(privacy) if privacy else None,
        seed=int(header["seed"]),
    )


def data_header(data: Examples | DataSource) -> dict[str, Any]:
    """Examples by value, or where they are."""
    if isinstance(data, Examples):
        return {"texts": data.texts, "labels": data.labels, "label_names": data.label_names}
    return {"path": str(data.path.absolute()), "text": data.text, "label": data.label}


def data_from(header: Mapping[str, Any]) -> Examples | DataSource:
    """The inverse of :func:`data_header`."""
    if "path" in header:
        return DataSource(Path(header["path"]), header["text"], header["label"])
    return Examples(tuple(header["texts"]), tuple(header["labels"]), tuple(header["label_names"]))


def result_header(result: Update | JobFailure) -> dict[str, Any]:
    """A result without its adapter."""
    if isinstance(result, JobFailure):
        return {
            "client": result.client,
            "round": result.round,
            "fault": result.fault.value,
            "detail": result.detail,
        }
    return {
        "client": result.client,
        "round": result.round,
        "start": result.start,
        "weight": result.weight,
        "privacy_event": dict(result.privacy_event),
        "metrics": dict(result.metrics),
    }


def results_from(
    headers: Sequence[Mapping[str, Any]], adapters: Sequence[Adapter]
) -> list[Update | JobFailure]:
    """The inverse of :func:`result_header`; failures have no adapter."""
    waiting, results = list(adapters), list[Update | JobFailure]()
    for h in headers:
        if "fault" in h:
            results.append(JobFailure(h["client"], h["round"], JobFault(h["fault"]), h["detail"]))
            continue
        results.append(
            Update(
                h["client"],
                h["round"],
                h["start"],
                waiting.pop(0),
                h["weight"],
                h["privacy_event"],
                h["metrics"],
            )
        )
    return results


def _named(adapter: Adapter) -> dict[str, str]:
    return {"spec": adapter.spec.to_json(), "digest": adapter.digest}


def _exactly(connection: socket.socket, count: int) -> bytes:
    chunks, left = [], count
    while left:
        chunk = connection.recv(min(left, 1 << 20))
        if not chunk:
            raise TrainerError("the other side of the socket closed in the middle of a frame")
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)
