from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.data import DataError, Examples, read_examples

NAMES = ("negative", "positive")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_three_formats_give_the_same_examples(tmp_path: Path) -> None:
    rows = [("good, really", "positive"), ('a "bad" one', "negative")]
    lines = "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows)
    jsonl = write(tmp_path / "a.jsonl", lines + "\n")
    csv = write(
        tmp_path / "a.csv", 'text,label\n"good, really",positive\n"a ""bad"" one",negative\n'
    )
    tsv = write(tmp_path / "a.tsv", 'text\tlabel\ngood, really\tpositive\na "bad" one\tnegative\n')
    found = {read_examples(path, label_names=NAMES).digest for path in (jsonl, csv, tsv)}
    assert len(found) == 1
    assert read_examples(tsv).label_names == NAMES
    assert read_examples(jsonl, label_names=NAMES) == Examples(
        ("good, really", 'a "bad" one'), (1, 0), NAMES
    )


def test_labels_may_be_indices_and_columns_may_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "review,stars\nfine,1\nawful,0\n")
    read = read_examples(path, text="review", label="stars", label_names=NAMES)
    assert read.labels == (1, 0)
    numbers = write(tmp_path / "n.jsonl", '{"text": "x", "label": 2}\n')
    assert read_examples(numbers).label_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "no examples"),
        ("a.csv", "text,label\n", "no examples"),
        ("a.csv", "words,label\nhi,positive\n", "no column 'text'; the columns are: label, words"),
        ("a.csv", "text,class\nhi,positive\n", "no column 'label'; the columns are: class, text"),
        ("a.csv", "text,label\nhi,neutral\n", "unknown label 'neutral'; allowed: negative, pos"),
        ("a.csv", "text,label\nhi,2\n", "more classes than labels"),
        ("a.csv", "text,label\nhi\n", "line 2: column 'label'"),
        ("a.jsonl", '{"text": "", "label": 0}\n', "line 1: column 'text' is empty"),
        ("a.jsonl", '{"text": 3, "label": 0}\n', "column 'text' is empty or not a text"),
        ("a.jsonl", '{"text": "x", "label": 0.5}\n', "class name or its index"),
        ("a.jsonl", '{"text": "x", "label": -1}\n', "unknown label -1"),
        ("a.jsonl", "\n{no\n", "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "not a JSON object"),
        ("a.parquet", "", "cannot read files that end in '.parquet'"),
    ],
)
def test_unusable_files_say_what_and_where(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=says) as caught:
        read_examples(path, label_names=NAMES)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"text,label\ncaf\xe9,positive\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(tmp_path / "latin.csv")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 0}\n')
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(tmp_path / "latin.jsonl")
    (tmp_path / "long.jsonl").write_bytes(b'{"text": "' + b"x" * (1 << 20) + b'"}')
    with pytest.raises(DataError, match="longer than"):
        read_examples(tmp_path / "long.jsonl")
    mixed = write(tmp_path / "m.jsonl", '{"text":"a","label":0}\n{"text":"b","label":"x"}\n')
    with pytest.raises(DataError, match="mixes"):
        read_examples(mixed)


def test_a_folder_needs_the_datasets_library_or_holds_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="datasets"):
        read_examples(tmp_path)


def test_examples_check_themselves() -> None:
    with pytest.raises(DataError):
        Examples(("a",), (0, 1), NAMES)
    with pytest.raises(DataError):
        Examples(("a",), (2,), NAMES)


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(0, 1)), min_size=1, max_size=5))
def test_the_digest_tells_all_differences(rows: list[tuple[str, int]]) -> None:
    texts, labels = zip(*rows, strict=True)
    examples = Examples(texts, labels, NAMES)
    assert examples.digest == Examples(texts, labels, NAMES).digest
    assert examples.digest != Examples((*texts, "x"), (*labels, 0), NAMES).digest
    flipped = (1 - labels[0], *labels[1:])
    assert examples.digest != Examples(texts, flipped, NAMES).digest
    assert examples.texts_digest == Examples(texts, flipped, NAMES).texts_digest


@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".csv", ".tsv"]))
def test_no_bytes_raise_anything_but_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        read_examples(path)
