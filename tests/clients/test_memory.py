"""What a client keeps between rounds: which round sees what, and what is forgotten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aggregation.adapter import Adapter
from aggregation.durable import StorageError
from aggregation.spec import AdapterSpec, ModuleSpec
from clients.memory import START, ClientMemory, Memories, MemoryDamaged

SPEC = AdapterSpec("sha256:" + "0" * 64, (ModuleSpec("query", 8, 4, rank=2, alpha=16.0),))


def adapter(value: float) -> Adapter:
    return Adapter(SPEC, {k: np.full(shape, value) for k, shape in SPEC.shapes().items()})


def of(value: float) -> Memories:
    vector = np.linspace(0, value, 5, dtype=np.float32)
    return Memories({START: adapter(value)}, {"feedback": vector})


def value(memories: Memories) -> float:
    return float(memories.adapters[START].pack()[0])


def test_a_round_sees_the_last_one_before_it_and_never_its_own(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, "run", "ann")
    assert not memory.before(1)
    memory.write(2, of(2.0))
    memory.write(5, of(5.0))
    assert value(memory.before(6)) == 5.0
    assert value(memory.before(5)) == 2.0  # round 5 is repeated
    assert not memory.before(2)
    assert value(memory.after(5)) == 5.0
    assert value(memory.of(2)) == 2.0
    assert not memory.of(3)
    assert np.array_equal(memory.of(5).vectors["feedback"], of(5.0).vectors["feedback"])


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    odd = Adapter(
        SPEC, {k: np.random.default_rng(1).normal(size=s) for k, s in SPEC.shapes().items()}
    )
    other = Adapter(
        SPEC.with_ranks(1), {k: np.ones(s) for k, s in SPEC.with_ranks(1).shapes().items()}
    )
    memory = ClientMemory(tmp_path, "run", "ann")
    memory.write(1, Memories({"own": odd, "overlay": other}, {"none": np.zeros(0, np.float32)}))
    found = ClientMemory(tmp_path, "run", "ann").before(2)
    assert found.adapters["own"].digest == odd.digest
    assert found.adapters["overlay"].digest == other.digest
    assert found.vectors == {}
    assert not (tmp_path / "run" / "ann" / "000001.safetensors").stat().st_mode & 0o077


def test_two_rounds_stay_and_a_run_taken_up_earlier_forgets_its_future(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, "run", "ann")
    for number in (1, 2, 3, 4):
        memory.write(number, of(float(number)))
    assert [path.name for path in sorted(memory.folder.iterdir())] == [
        "000003.safetensors",
        "000004.safetensors",
    ]
    memory.write(3, of(30.0))
    assert value(memory.after(9)) == 30.0
    assert not memory.of(4)


def test_an_adapter_is_found_by_its_digest_while_it_is_kept(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, "run", "ann")
    for number in (1, 2, 3):
        memory.write(number, of(float(number)))
    found = memory.find(adapter(2.0).digest)
    assert found is not None
    assert found.digest == adapter(2.0).digest
    assert memory.find(adapter(1.0).digest) is None
    assert ClientMemory(tmp_path, "run", "bob").find(adapter(2.0).digest) is None
    assert ClientMemory(tmp_path, "other", "ann").find(adapter(2.0).digest) is None


def test_old_runs_are_forgotten(tmp_path: Path) -> None:
    for number in range(12):
        ClientMemory(tmp_path, f"run-{number}", "ann").write(1, of(1.0))
    assert len(list(tmp_path.iterdir())) == 8
    assert ClientMemory(tmp_path, "run-11", "ann").of(1)


@pytest.mark.parametrize("name", ["..", "a/b", "", "x" * 300, "\ud800"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    memory = ClientMemory(tmp_path / "m", name, name)
    memory.write(1, of(1.0))
    assert value(memory.of(1)) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, "run", "ann")
    memory.write(1, of(1.0))
    path = memory.folder / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(MemoryDamaged, match=r"000001\.safetensors.*remove the folder"):
        memory.before(2)
    memory.write(2, of(2.0))
    assert value(memory.before(3)) == 2.0


def test_a_disk_that_takes_nothing_leaves_what_was_there(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path, "run", "ann")
    memory.write(1, of(1.0))
    (memory.folder / "000002.safetensors.partial").mkdir()  # stands in the way of the write
    with pytest.raises(StorageError):
        memory.write(2, of(2.0))
    assert value(memory.before(2)) == 1.0
