"""The filter language: what it means, what it refuses, and that nothing breaks its reader."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from federation.filters import FIELDS, FLAGS, NUMBERS, Compare, Filter, FilterError, Many, Not
from federation.waves import RolloutError, Wave, parse_plan

KITCHEN: dict[str, Any] = {
    "id": "kitchen-7",
    "tag.site": "north",
    "memory_bytes": 4_000_000_000,
    "connected": True,
    "running": "stable-2",
}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('tag.site == "north" and memory_bytes >= 2e9', True),
        ('tag.site=="north"and memory_bytes>=8e9', False),
        ('tag.site != "north" or id ~ "kitchen-*"', True),
        ('id ~ "*-7"', True),
        ('id ~ "kitchen-?"', False),
        ('id ~ "kitchen-[0-9]"', False),
        ('not (tag.site in ("south", "east"))', True),
        ('tag.colour == ""', True),
        ("battery_percent < 20", False),
        ("not battery_percent < 20", True),
        ("cpu_count in (1, 2)", False),
        ("connected == true and revoked == false", True),
        ('running == "stable-2" and (tag.site == "x" or tag.site == "north")', True),
        ('tag.site == "x" and tag.site == "y" or connected == true', True),
    ],
)
def test_meaning(text: str, answer: bool) -> None:
    found = Filter.parse(text)
    assert found.matches(KITCHEN) is answer
    assert Filter.parse(str(found)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is the end, where a field"),
        ("site == 1", "unknown field 'site'"),
        ('memory_bytes == "2"', "a number may stand"),
        ("tag.site == 2", 'a text such as "north" may stand'),
        ('tag.site < "a"', "since tag.site is a text"),
        ("connected == 1", "true or false"),
        ('tag.site == "a" tag.site', "'and', 'or' or the end"),
        ('(tag.site == "a"', r"'\)'"),
        ('tag.site == "a', "may stand"),
        ("tag.site == 'a'", "may stand"),
        ("id in ()", "a text such as"),
        ('__import__("os")', "unknown field '__import__'"),
        ("(" * 40, "32 levels"),
        ("not " * 40, "32 levels"),
        ("x" * 1001, "1000 characters"),
    ],
)
def test_refusals_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(FilterError, match=message):
        Filter.parse(text)


WORDS = st.sampled_from(
    [
        *FIELDS, "tag.site", "tag.", "and", "or", "not", "in", "true", "false", "(", ")", ",", "==",
        "!=", "<", ">=", "~", '"north"', '"*"', "2e9", "-1.5", "1e999", '"', "'", "\\", "\x00", " ",
    ]
)  # fmt: skip


@given(st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=30).map(" ".join)))
@example("not" * 300)
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    try:
        found = Filter.parse(text)
    except FilterError:
        return
    assert found.matches(KITCHEN) in (True, False)
    assert found.matches({}) in (True, False)
    assert Filter.parse(str(found)) == found


texts = st.text(st.characters(exclude_characters='"\\', exclude_categories=["C"]), max_size=5)
numbers = st.floats(-1e9, 1e9)
comparisons = st.one_of(
    st.builds(
        lambda f, s, v: Compare(f, s, (v,)),
        st.sampled_from(["id", "tag.site", "running"]),
        st.sampled_from(["==", "!=", "~"]),
        texts,
    ),
    st.builds(
        lambda f, s, v: Compare(f, s, (v,)),
        st.sampled_from(NUMBERS),
        st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
        numbers,
    ),
    st.builds(
        lambda f, v: Compare(f, "in", tuple(v)),
        st.sampled_from(NUMBERS),
        st.lists(numbers, min_size=1, max_size=3),
    ),
    st.builds(lambda f, v: Compare(f, "==", (v,)), st.sampled_from(FLAGS), st.booleans()),
)
terms = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.builds(Not, inner),
        st.builds(
            Many,
            st.sampled_from(["and", "or"]),
            st.lists(inner, min_size=2, max_size=3).map(tuple),
        ),
    ),
    max_leaves=8,
)


@given(terms)
@settings(max_examples=200, deadline=None)
def test_what_is_written_is_what_is_read(term: Any) -> None:
    found = Filter(term)
    if len(str(found)) <= 1000:
        again = Filter.parse(str(found))
        assert str(again) == str(found)
        assert again.matches(KITCHEN) == found.matches(KITCHEN)


def test_waves_carry_filters_and_grow_exponentially() -> None:
    wave = Wave.parse('25% where tag.site == "a where b"')
    assert (wave.percent, wave.everybody) == (25.0, False)
    assert Wave.parse(str(wave)) == wave
    assert not Wave.parse("where connected == true").everybody
    assert [str(wave) for wave in parse_plan(["2x2.5"], 30)] == ["2", "5", "13", "100%"]
    for words, message in (
        (["1x1"], "factor above 1"),
        (["0x2"], "factor above 1"),
        (["1"] * 60, "at most 50"),
        (["where connected == true"], "last wave must be 100%"),
    ):
        with pytest.raises(RolloutError, match=message):
            parse_plan(words, 10)


def test_what_is_written_out_can_be_read_again() -> None:
    deep = 'tag.a == "1"'
    for _ in range(20):
        deep = f'tag.a=="1"or tag.b=="2"and ({deep})'
    found = Filter.parse(deep)
    assert Filter.parse(str(found)) == found
    with pytest.raises(FilterError, match="when it is written out"):
        Filter.parse("or ".join(["cpu_count<1"] * 70))
