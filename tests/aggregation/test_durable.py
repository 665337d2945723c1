"""A kill at any step leaves the old content or the new; a full disk leaves the old."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aggregation import durable
from aggregation.durable import StorageError, write_bytes, write_folder
from tests.full_disk import full_after

# The child dies just before, or just after, its n-th call that changes what is on the disk.
CHILD = """
import os, sys
from pathlib import Path
from aggregation import durable

kind, target, fatal, moment, exchange = sys.argv[1:]
calls = 0

def deadly(real):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(fatal) and moment == "before":
            os._exit(9)
        mine = calls
        try:
            return real(*args, **kwargs)
        finally:
            if mine == int(fatal):
                os._exit(9)
    return call

for module, names in ((os, ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open")),
                      (durable, ("exchange",))):
    for name in names:
        setattr(module, name, deadly(getattr(module, name)))
if exchange == "no":
    durable.exchange = lambda first, second: False
path = Path(target)
if kind == "file":
    durable.write_bytes(path, b"new")
else:
    durable.write_folder(path, {"a": b"new", "sub/b": b"new"})
"""


def run_child(kind: str, target: Path, fatal: int, moment: str, exchange: str = "yes") -> int:
    return subprocess.run(
        [sys.executable, "-c", CHILD, kind, str(target), str(fatal), moment, exchange],
        check=False,
        capture_output=True,
        cwd=Path(__file__).parents[2],
    ).returncode


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


OLD, NEW = {"a": b"old", "c": b"old"}, {"a": b"new", "sub/b": b"new"}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_file_is_old_or_new_whenever_the_writer_is_killed(tmp_path: Path, moment: str) -> None:
    seen, fatal = set(), 0
    while True:
        fatal += 1
        path = tmp_path / f"{fatal}" / "file"
        path.parent.mkdir()
        path.write_bytes(b"old")
        code = run_child("file", path, fatal, moment)
        seen.add(path.read_bytes())
        write_bytes(path, b"next")
        assert [p.name for p in path.parent.iterdir()] == ["file"]
        if code == 0:
            break
        assert code == 9
    assert seen == {b"old", b"new"}
    assert fatal > 4


@pytest.mark.parametrize(("exchange", "moment"), [("yes", "before"), ("no", "after")])
def test_a_folder_is_old_or_new_whenever_the_writer_is_killed(
    tmp_path: Path, exchange: str, moment: str
) -> None:
    """With the kernel's exchange at every moment; without it, after recover_folder."""
    seen, fatal = [], 0
    while True:
        fatal += 1
        path = tmp_path / f"{fatal}" / "folder"
        write_folder(path, OLD)
        code = run_child("folder", path, fatal, moment, exchange)
        if exchange == "no":
            durable.recover_folder(path)
        assert content(path) in (OLD, NEW)
        seen.append(content(path))
        write_folder(path, {"x": b"next"})
        assert content(path) == {"x": b"next"}
        assert [p.name for p in path.parent.iterdir()] == ["folder"]
        if code == 0:
            break
        assert code == 9
    assert OLD in seen
    assert NEW in seen
    assert fatal > 15
    assert seen == sorted(seen, key=lambda found: found == NEW)  # new once, new from there on


def test_the_exchange_of_this_system_works_or_says_no(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_folder(one, {"a": b"1"})
    write_folder(two, {"a": b"2"})
    swapped = durable.exchange(one, two)
    assert content(one) == ({"a": b"2"} if swapped else {"a": b"1"})
    assert not durable.exchange(one, tmp_path / "missing")


def test_a_full_disk_leaves_the_old_content_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    for room in (0, 1):  # for nothing; for the name, and not for what is in it
        with (
            full_after(room, tmp_path) as disk,
            pytest.raises(StorageError, match=r"file: the disk is full: free some space"),
        ):
            write_bytes(path, b"new")
        assert disk.refused
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_does_not_fit_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    write_folder(path, OLD)
    child = """
import resource, sys
from pathlib import Path
from aggregation import durable
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    durable.write_folder(Path(sys.argv[1]), {"a": b"new", "big": b"x" * 5000})
except durable.StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", child, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert "larger than this process may write" in done.stdout
    assert content(path) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_errors_name_the_path_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        write_folder(tmp_path / "file" / "below", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="there is a folder where a file should be"):
        write_bytes(tmp_path / "folder", b"")
    with pytest.raises(StorageError, match="File name too long"):
        write_bytes(tmp_path / ("x" * 300), b"")


def test_secrets_are_private_even_over_a_partial_of_another_writer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "below" / "key"
    write_bytes(path, b"1", mode=0o600)
    path.with_name("key.partial").write_bytes(b"left over")
    os.chmod(path.with_name("key.partial"), 0o644)  # noqa: PTH101
    write_bytes(path, b"2", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() == b"2"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_that_lies_in_wait_leads_to_no_other_file(tmp_path: Path, link: Any) -> None:
    """On a stick, or in a folder that was brought here to be signed."""
    victim, path = tmp_path / "victim", tmp_path / "stick" / "timestamp.json"
    victim.write_bytes(b"a private key, say")
    path.parent.mkdir()
    for name in ("timestamp.json.partial", "timestamp.json"):
        link(victim, path.with_name(name))
    write_bytes(path, b"1")
    assert victim.read_bytes() == b"a private key, say"
    assert (path.read_bytes(), path.is_symlink()) == (b"1", False)
    assert [p.name for p in path.parent.iterdir()] == ["timestamp.json"]
