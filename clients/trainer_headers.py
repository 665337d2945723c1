"""What is asked of a trainer over its socket, and what it answers, as frames.

Every function comes with its inverse. Adapters and bytes stand in the frame in the order in which
the header speaks of them; numbers of a matrix are little-endian float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from aggregation.adapter import Adapter
from aggregation.parcel import Parcel
from aggregation.train import Assignment
from aggregation.update import Update
from clients.data import DataSource, Examples
from clients.faults import JobFailure, JobFault
from clients.secure_desk import SecureRequest
from clients.secure_identity import SecureIdentity
from clients.trainer_wire import Frame, TrainerError
from clients.training import ClientJob, Owner, TrainingPlan
from privacy.budget import LocalPrivacy

T = TypeVar("T")
Matrices = Mapping[str, npt.NDArray[np.float32]]


def jobs_frame(jobs: Sequence[ClientJob]) -> Frame:
    """A request to train."""
    return Frame(
        {"verb": "train", "jobs": [_job_header(job) for job in jobs]},
        [adapter for job in jobs for adapter in (job.adapter, *job.beside)],
    )


def jobs_from(frame: Frame) -> list[ClientJob]:
    """The inverse of :func:`jobs_frame`."""
    waiting = iter(frame.adapters)
    return [_job_from(header, waiting) for header in frame.header["jobs"]]


def results_frame(results: Sequence[Update | JobFailure]) -> Frame:
    """What training came to."""
    adapters: list[Adapter] = []
    blobs: list[bytes] = []
    headers = []
    for result in results:
        if isinstance(result, JobFailure):
            headers.append(
                {
                    "client": result.client,
                    "round": result.round,
                    "fault": result.fault.value,
                    "detail": result.detail,
                }
            )
            continue
        adapters.append(result.adapter)
        header: dict[str, Any] = {
            "client": result.client,
            "round": result.round,
            "start": result.start,
            "weight": result.weight,
            "privacy_event": dict(result.privacy_event),
            "metrics": dict(result.metrics),
        }
        if result.parcel is not None:
            header["parcel"] = {"codec": result.parcel.codec, "keys": result.parcel.keys}
            blobs.append(result.parcel.data)
        header["sketches"] = _matrix_header(result.sketches)
        blobs += _matrix_blobs(result.sketches)
        headers.append(header)
    return Frame({"results": headers}, adapters, blobs)


def results_from(frame: Frame) -> list[Update | JobFailure]:
    """The inverse of :func:`results_frame`."""
    adapters, blobs = iter(frame.adapters), iter(frame.blobs)
    results = list[Update | JobFailure]()
    for h in frame.header["results"]:
        if "fault" in h:
            results.append(JobFailure(h["client"], h["round"], JobFault(h["fault"]), h["detail"]))
            continue
        adapter, said = _next(adapters), h.get("parcel")
        parcel = Parcel(said["codec"], tuple(said["keys"]), _next(blobs)) if said else None
        results.append(
            Update(
                h["client"],
                h["round"],
                h["start"],
                adapter,
                h["weight"],
                h["privacy_event"],
                h["metrics"],
                parcel=parcel,
                sketches=_matrices_from(h["sketches"], blobs),
            )
        )
    return results


def evaluation_frame(
    adapter: Adapter,
    data: Examples | DataSource,
    max_length: int,
    beside: Sequence[Adapter],
    owner: Owner | None,
) -> Frame:
    """A request to measure."""
    header: dict[str, Any] = {
        "verb": "evaluate",
        "data": data_header(data),
        "max_length": max_length,
    }
    if owner is not None:
        header["owner"] = {
            "client": owner.client,
            "run": owner.run,
            "round": owner.round,
            "assignment": owner.assignment.to_mapping(),
            "memory": _path_header(owner.memory),
        }
    return Frame(header, [adapter, *beside])


def evaluation_from(
    frame: Frame,
) -> tuple[Adapter, Examples | DataSource, int, tuple[Adapter, ...], Owner | None]:
    """The inverse of :func:`evaluation_frame`."""
    header, said = frame.header, frame.header.get("owner")
    owner = said and Owner(
        client=str(said["client"]),
        run=str(said["run"]),
        round=int(said["round"]),
        assignment=Assignment.from_mapping(said["assignment"]),
        memory=_path_from(said["memory"]),
    )
    adapter, *beside = frame.adapters
    return adapter, data_from(header["data"]), int(header["max_length"]), tuple(beside), owner


def secure_frame(request: SecureRequest) -> Frame:
    """A request for one step of a secure sum."""
    header = {key: value for key, value in vars(request).items() if key not in ("blobs", "step")}
    header |= {"verb": "secure", "step": request.step, "names": list(request.names)}
    header |= {"identity": request.identity.to_mapping(), "keys": list(request.blobs)}
    return Frame(header, (), list(request.blobs.values()))


def secure_from(frame: Frame) -> SecureRequest:
    """The inverse of :func:`secure_frame`."""
    said = frame.header
    return SecureRequest(
        client=str(said["client"]),
        run=str(said["run"]),
        round=int(said["round"]),
        part=int(said["part"]),
        step=str(said["step"]),
        names=tuple(str(name) for name in said["names"]),
        blobs=named_from(frame),
        dropouts=float(said["dropouts"]),
        corrupt=float(said["corrupt"]),
        identity=SecureIdentity(**said["identity"]),
    )


def named_frame(blobs: Mapping[str, bytes]) -> Frame:
    """An answer of bytes by name."""
    return Frame({"keys": list(blobs)}, (), list(blobs.values()))


def named_from(frame: Frame) -> dict[str, bytes]:
    """The inverse of :func:`named_frame`."""
    return dict(zip(frame.header["keys"], frame.blobs, strict=True))


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


def _job_header(job: ClientJob) -> dict[str, Any]:
    return {
        "client": job.client,
        "run": job.run,
        "round": job.round,
        "data": data_header(job.data),
        "plan": job.plan.to_mapping(),
        "privacy": job.privacy.to_mapping() if job.privacy else None,
        "seed": job.seed,
        "assignment": job.assignment.to_mapping(),
        "codec": job.codec,
        "beside": len(job.beside),
        "memory": _path_header(job.memory),
        "secure": dict(job.secure),
    }


def _job_from(header: Mapping[str, Any], adapters: Iterator[Adapter]) -> ClientJob:
    privacy = header["privacy"]
    return ClientJob(
        client=str(header["client"]),
        run=str(header["run"]),
        round=int(header["round"]),
        adapter=_next(adapters),
        data=data_from(header["data"]),
        plan=TrainingPlan.from_mapping(header["plan"]),
        privacy=LocalPrivacy.from_mapping(privacy) if privacy else None,
        seed=int(header["seed"]),
        assignment=Assignment.from_mapping(header["assignment"]),
        codec=str(header["codec"]),
        beside=tuple(_next(adapters) for _ in range(int(header["beside"]))),
        memory=_path_from(header["memory"]),
        secure=dict(header["secure"]),
    )


def _next(waiting: Iterator[T]) -> T:
    try:
        return next(waiting)
    except StopIteration:
        raise TrainerError("the frame holds less than its header speaks of") from None


def _path_header(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _path_from(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _matrix_header(matrices: Matrices) -> dict[str, list[int]]:
    return {name: list(matrix.shape) for name, matrix in matrices.items()}


def _matrix_blobs(matrices: Matrices) -> list[bytes]:
    return [np.asarray(m, "<f4", order="C").tobytes() for m in matrices.values()]


def _matrices_from(
    header: Mapping[str, Sequence[int]], blobs: Iterator[bytes]
) -> dict[str, npt.NDArray[np.float32]]:
    found = {}
    for name, shape in header.items():
        try:
            values = np.frombuffer(_next(blobs), "<f4").astype(np.float32, copy=False)
            found[name] = values.reshape(tuple(shape))
        except ValueError as error:
            raise TrainerError(f"matrix {name!r} does not fit its shape: {error!r}") from None
    return found
