"""``airpeft doctor``: is this machine fit, and if not, what is to be done about it.

Each check is a function that returns one :class:`Finding`; none changes anything, none needs the
network, and none loads a model into memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from aggregation.output import AsFormat, Format, show_json

MIB = 1 << 20
HOUR, DAY, YEAR = 3600, 86400, 365 * 86400
NEEDED_DISK = 2048 * MIB
NEEDED_MEMORY = 2048 * MIB


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        status: ``ok``, ``warning`` (works, but), or ``problem``.
        found: what is there.
        remedy: what to do; empty if nothing is to be done.
    """

    check: str
    status: str
    found: str
    remedy: str = ""


def python() -> Finding:
    """The interpreter's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", "ok", found)
    return Finding("Python", "problem", found, "install Python 3.11 or 3.12 and set up again")


def packages() -> Finding:
    """Every required package is there, in a version that AirPEFT was tested with."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in metadata.requires("airpeft") or []]
    except metadata.PackageNotFoundError:
        return Finding("packages", "problem", "airpeft is not installed", "run make setup")
    wrong, count = [], 0
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        remedy = "run make setup, or pip install -r requirements/lock.txt"
        return Finding("packages", "problem", "; ".join(wrong), remedy)
    return Finding("packages", "ok", f"all {count} in tested versions")


def our_names() -> Finding:
    """No other distribution owns (and would overwrite) one of our top-level packages."""
    owners = metadata.packages_distributions()
    ours = ("aggregation", "privacy", "protos", "clients", "federation", "simulations")
    shared = [f"{n} ({', '.join(owners[n])})" for n in ours if set(owners.get(n, ())) - {"airpeft"}]
    if shared:
        remedy = "give AirPEFT an environment of its own"
        return Finding(
            "package names", "problem", "also owned by others: " + "; ".join(shared), remedy
        )
    return Finding("package names", "ok", "owned by airpeft alone")


def base_model(name: str) -> Finding:
    """The base model can be found and digested."""
    from clients.errors import ClientError
    from clients.model import find_base

    try:
        base = find_base(name)
    except ClientError as error:
        return Finding(f"base model {name}", "problem", str(error), "make setup installs it")
    return Finding(f"base model {name}", "ok", base.digest[:19])


def port(number: int) -> Finding:
    """A port of the loopback interface can be bound; 0 asks for any."""
    name = f"port {number}" if number else "loopback ports"
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as error:
            remedy = "choose another, or stop the program that holds it"
            return Finding(name, "problem", error.strerror or str(error), remedy)
        return Finding(name, "ok", "free" if number else "can be bound")


def clock(now: float) -> Finding:
    """The clock is not before this installation, nor long after it.

    A device needs a clock that is right to the hour, because signed metadata expires; without a
    network the only certain floor is the moment at which these files were installed.

    Args:
        now: what the clock says, Unix seconds.
    """
    ahead = now - Path(__file__).stat().st_mtime
    said = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if ahead < -HOUR:
        return Finding("clock", "problem", f"{said}, before AirPEFT was installed", "set the clock")
    if ahead > YEAR - DAY:
        found = f"{said}, {ahead / YEAR:.0f} years after AirPEFT was installed"
        return Finding("clock", "warning", found, "check the clock; if it is right, update AirPEFT")
    return Finding("clock", "ok", said)


def folder(path: Path) -> Finding:
    """A folder can be written, durably, and has room for a run."""
    name = f"folder {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"airpeft")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(path).free
    except OSError as error:
        return Finding(name, "problem", error.strerror or str(error), "choose a writable folder")
    if free < NEEDED_DISK:
        needed = NEEDED_DISK // MIB
        return Finding(name, "problem", f"{free // MIB} MiB free", f"free {needed} MiB")
    return Finding(name, "ok", f"writable, {free / (1 << 30):.1f} GiB free")


def memory() -> Finding:
    """Memory for a base model and a trainer."""
    import psutil

    free = psutil.virtual_memory().available
    if free < NEEDED_MEMORY:
        remedy = f"training and the demo want {NEEDED_MEMORY // MIB} MiB; serving alone needs less"
        return Finding("memory", "warning", f"{free // MIB} MiB available", remedy)
    return Finding("memory", "ok", f"{free / (1 << 30):.1f} GiB available")


def cores() -> Finding:
    """Processors that this process may use."""
    count = len(os.sched_getaffinity(0))
    if count < 2:
        return Finding("processors", "warning", "1", "the demo takes twice as long on one core")
    return Finding("processors", "ok", str(count))


def examine(path: Path, base: str, ports: tuple[int, ...]) -> Iterator[Finding]:
    """All checks, one after the other."""
    checks: list[Callable[[], Finding]] = [python, packages, our_names, lambda: base_model(base)]
    checks += [lambda n=n: port(n) for n in ports or (0,)]  # type: ignore[misc]
    checks += [lambda: clock(time.time()), lambda: folder(path), memory, cores]
    for check in checks:
        yield check()


def doctor(
    path: Annotated[
        Path, typer.Option("--home", help="Folder that a run or a device would write to.")
    ] = Path(),
    base: Annotated[str, typer.Option(help="Base model: a name, or a folder.")] = "minilm",
    ports: Annotated[
        list[int] | None, typer.Option("--port", help="A port that must be free; may be repeated.")
    ] = None,
    output: AsFormat = Format.TABLE,
) -> None:
    """Check this machine, and say what to do.

    For example:

      airpeft doctor

      airpeft doctor --home /var/lib/airpeft --port 7443 --format json

    Exit status: 0 if nothing stands in the way, 1 if a problem was found, 2 for a wrong option.
    """
    findings = list(examine(path, base, tuple(ports or ())))
    problems = [f for f in findings if f.status == "problem"]
    if output is Format.JSON:
        data = {"ok": not problems, "findings": [asdict(f) for f in findings]}
        show_json("doctor", data)
    else:
        width = max(len(f.check) for f in findings)
        for f in findings:
            typer.echo(f"{f.status:8}{f.check:{width}}  {f.found}")
            if f.remedy:
                typer.echo(f"{'':8}{'':{width}}  -> {f.remedy}")
    raise typer.Exit(1 if problems else 0)
