from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from aggregation.durable import StorageError
from simulations import datasets
from simulations.datasets import DatasetError, column, load, materialise
from simulations.partition import Iid, make_split


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    rows = [(f"sentence {i}", ("no", "yes")[i % 2], f"site {i % 3}") for i in range(30)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("sentence", "answer", "site"), *rows])
    return path


def test_the_shipped_data_is_whole_and_clean() -> None:
    data = load("sentiment")
    texts, labels = data.examples.texts, data.examples.labels
    assert len(texts) == len(set(texts)) == 19410
    assert Counter(labels) == {1: 10259, 0: 9151}
    assert all(t == " ".join(t.split()) for t in texts)
    assert Counter(column(data, "domain").tolist()).total() == 19410
    assert len(set(column(data, "domain").tolist())) == 4
    licence = Path(datasets.__file__).parent / "data" / "sentiment.LICENSE.txt"
    assert licence.read_text().startswith("The MIT License")


def test_a_users_own_file(mine: Path) -> None:
    data = load(path=mine, text="sentence", label="answer")
    assert data.examples.label_names == ("no", "yes")
    assert data.source == "mine.csv"
    assert sorted(set(column(data, "site", text="sentence").tolist())) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"text": "words"}, ["'words'", "answer", "sentence", "site"]),
        ({"text": "sentence"}, ["'label'", "answer"]),
        ({"text": "sentence", "label": "answer", "label_names": ("no",)}, ["yes", "allowed: no"]),
    ],
)
def test_missing_columns_and_labels_are_named(
    mine: Path, arguments: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(DatasetError) as caught:
        load(path=mine, **arguments)  # type: ignore[arg-type]
    for word in [str(mine), *words]:
        assert word in str(caught.value)


def test_what_is_not_there_is_named(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="'sentimemt' is not one of sentiment"):
        load("sentimemt")
    with pytest.raises(DatasetError, match="no such file"):
        load(path=tmp_path / "none.csv")
    with pytest.raises(DatasetError, match="there is no column 'place'"):
        column(load(path=mine, text="sentence", label="answer"), "place", text="sentence")
    one = tmp_path / "one.csv"
    one.write_text("text,label\na,x\nb,x\n")
    with pytest.raises(DatasetError, match="only the class 'x'"):
        load(path=one)


def test_clients_get_files_that_a_real_client_could_have(mine: Path, tmp_path: Path) -> None:
    data = load(path=mine, text="sentence", label="answer")
    split = make_split(data.labels, Iid(), clients=4, heldout=0.2, minimum=2, seed=1)
    folder = tmp_path / "partitions"
    materialise(folder, data, split)
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        *(f"client-{i:05d}.jsonl" for i in range(4)),
        "heldout.jsonl",
        "partition.json",
    ]
    texts = [
        json.loads(line)["text"]
        for path in folder.glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sorted(texts) == sorted(data.examples.texts)
    back = datasets.read(folder / "client-00002.jsonl", ("no", "yes"))
    assert back.texts == tuple(data.examples.texts[i] for i in split.clients[2])
    assert np.array_equal(back.labels, data.labels[split.clients[2]])
    summary = json.loads((folder / "partition.json").read_text())
    assert sum(sum(h) for h in summary["clients"].values()) + sum(summary["heldout"]) == 30


def test_a_folder_that_cannot_be_written_is_named(mine: Path, tmp_path: Path) -> None:
    data = load(path=mine, text="sentence", label="answer")
    split = make_split(data.labels, Iid(), clients=1, heldout=0.2, minimum=2, seed=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        materialise(tmp_path / "file" / "partitions", data, split)


def test_a_shipped_set_has_no_more_classes_than_the_scenario_names() -> None:
    with pytest.raises(DatasetError, match=r"unknown label 'positive'; allowed: negative"):
        load("sentiment", label_names=["negative"])
