"""A small typed language that picks devices by tags and inventory.

    tag.site == "north" and memory_bytes >= 2e9
    not (runtime in ("torch", "llamacpp")) or running == "" or id ~ "kitchen-*"

Grammar (spaces between words do not matter)::

    filter     = conjunct { "or" conjunct }
    conjunct   = term { "and" term }
    term       = "not" term | "(" filter ")" | comparison
    comparison = field ( "==" | "!=" ) value | field ( "<" | "<=" | ">" | ">=" ) number
               | field "in" "(" value { "," value } ")" | field "~" text
    value      = text | number | "true" | "false"
    text       = '"' any characters but quotes, backslashes and control characters '"'

Fields are typed: texts are compared with texts, numbers with numbers, a mistake is refused when
the filter is read. ``~`` matches a text with ``*`` for any run of characters; there are no regular
expressions, nothing is evaluated, and both the length and the depth are bounded. A tag that a
device does not have is the empty text.

    >>> north = Filter.parse('tag.site == "north" and memory_bytes >= 2e9')
    >>> north.matches({"tag.site": "north", "memory_bytes": 4_000_000_000}), north.matches({})
    (True, False)
    >>> str(Filter.parse('not(id~"kitchen-*")'))
    'not id ~ "kitchen-*"'
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite
from operator import eq, ge, gt, le, lt, ne
from typing import Any

from federation.errors import FederationError

LENGTH_MAX, DEPTH_MAX = 1_000, 32
TEXTS = ("id", "running", "runtime", "platform", "agent_version", "base_digest")
NUMBERS = ("memory_bytes", "cpu_count", "disk_free_bytes", "battery_percent", "silent_hours")
FLAGS = ("connected", "revoked")
FIELDS = (*TEXTS, *NUMBERS, *FLAGS)

_COMPARE = {"==": eq, "!=": ne, "<": lt, "<=": le, ">": gt, ">=": ge}
_TOKEN = re.compile(
    r'\s*(?:(?P<text>"[^"\\\x00-\x1f]*")|(?P<number>-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)'
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)|(?P<sign>==|!=|<=|>=|<|>|~|\(|\)|,))",
    re.ASCII,
)
_TAG = re.compile(r"tag\.[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z", re.ASCII)

Value = str | float | bool


class FilterError(FederationError):
    """A filter that cannot be read; the text says where and what is allowed there."""


@dataclass(frozen=True)
class Compare:
    """One field against one value, or against several with ``in``."""

    field: str
    sign: str
    values: tuple[Value, ...]

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether it is true of a device; a number that is not known matches nothing."""
        kind = _kind(self.field)
        found = facts.get(self.field)
        if found is None:
            if kind is float:
                return False
            found = kind()
        if self.sign == "in":
            return found in self.values
        if self.sign == "~":
            return fnmatchcase(str(found), _pattern(str(self.values[0])))
        return bool(_COMPARE[self.sign](found, self.values[0]))

    def __str__(self) -> str:
        """As :meth:`Filter.parse` reads it."""
        words = [_written(value) for value in self.values]
        right = f"({', '.join(words)})" if self.sign == "in" else words[0]
        return f"{self.field} {self.sign} {right}"


@dataclass(frozen=True)
class Not:
    """The opposite."""

    part: Term

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether it is true of a device."""
        return not self.part.holds(facts)

    def __str__(self) -> str:
        """As :meth:`Filter.parse` reads it."""
        return f"not {_bracketed(self.part)}"


@dataclass(frozen=True)
class Many:
    """All of the parts (``and``), or at least one (``or``)."""

    word: str
    parts: tuple[Term, ...]

    def holds(self, facts: Mapping[str, Any]) -> bool:
        """Whether it is true of a device."""
        answers = (part.holds(facts) for part in self.parts)
        return all(answers) if self.word == "and" else any(answers)

    def __str__(self) -> str:
        """As :meth:`Filter.parse` reads it.

        With no more brackets than there were: what is stored must be no deeper than what was read.
        """
        return f" {self.word} ".join(
            str(part)
            if self.word == "or" and isinstance(part, Many) and part.word == "and"
            else _bracketed(part)
            for part in self.parts
        )


Term = Compare | Not | Many


@dataclass(frozen=True)
class Filter:
    """A filter that has been read and is sound."""

    term: Term

    @classmethod
    def parse(cls, text: str) -> Filter:
        """Read a filter.

        Raises:
            FilterError: too long, too deep, an unknown field, or not of the grammar.
        """
        if len(text) > LENGTH_MAX:
            raise FilterError(f"a filter has at most {LENGTH_MAX} characters, this has {len(text)}")
        reader = _Reader(text)
        term = reader.term_of("or")
        if reader.word:
            raise reader.wrong("'and', 'or' or the end")
        found = cls(term)
        if len(written := str(found)) > LENGTH_MAX:
            raise FilterError(
                f"a filter has at most {LENGTH_MAX} characters, this has {len(written)} when it is"
                " written out with all its spaces"
            )
        return found

    def matches(self, facts: Mapping[str, Any]) -> bool:
        """Whether a device is meant.

        Args:
            facts: what is known of it by field, as :func:`federation.facts.facts` gives it.
        """
        return self.term.holds(facts)

    def __str__(self) -> str:
        """As :meth:`parse` reads it."""
        return str(self.term)


class _Reader:
    """Reads one word after the other; recursive descent, with a bound on its depth."""

    def __init__(self, text: str) -> None:
        self._text, self._next, self._depth = text.strip(), 0, 0
        self.word, self._kind, self._at = "", "", 0
        self._step()

    def term_of(self, word: str) -> Term:
        """A chain of ``or``, or below it one of ``and``."""
        parts: list[Term] = []
        while not parts or (self._kind == "name" and self.word == word):
            if parts:
                self._step()
            parts.append(self.term_of("and") if word == "or" else self._single())
        return parts[0] if len(parts) == 1 else Many(word, tuple(parts))

    def wrong(self, wanted: str) -> FilterError:
        """What to raise where something else is found than what may stand there."""
        found = repr(self.word) if self.word else "the end"
        return FilterError(
            f"filter {self._text!r}: at character {self._at + 1} there is {found}, where {wanted}"
            " may stand"
        )

    def _single(self) -> Term:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise FilterError(f"a filter is at most {DEPTH_MAX} levels deep")
        try:
            if self.word == "not" and self._kind == "name":
                self._step()
                return Not(self._single())
            if self.word == "(" and self._kind == "sign":
                self._step()
                term = self.term_of("or")
                self._expect(")")
                return term
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Compare:
        field = self.word
        if self._kind != "name" or field in ("and", "or", "in", "true", "false"):
            raise self.wrong("a field, 'not' or '('")
        if field not in FIELDS and not _TAG.match(field):
            raise FilterError(f"unknown field {field!r}: one of tag.NAME, {', '.join(FIELDS)}")
        self._step()
        kind, sign = _kind(field), self.word
        allowed = {
            str: ("==", "!=", "in", "~"),
            float: ("==", "!=", "in", "<", "<=", ">", ">="),
            bool: ("==", "!="),
        }[kind]
        if sign not in allowed or self._kind == "text":
            raise self.wrong(f"one of {' '.join(allowed)}, since {field} is a {_NAMES[kind]},")
        self._step()
        if sign != "in":
            return Compare(field, sign, (self._value(kind),))
        self._expect("(")
        values = [self._value(kind)]
        while self.word == "," and self._kind == "sign":
            self._step()
            values.append(self._value(kind))
        self._expect(")")
        return Compare(field, sign, tuple(values))

    def _value(self, kind: type) -> Value:
        word, found = self.word, self._kind
        value: Value
        if kind is str and found == "text":
            value = word[1:-1]
        elif kind is float and found == "number" and isfinite(float(word)):
            value = float(word)
        elif kind is bool and found == "name" and word in ("true", "false"):
            value = word == "true"
        else:
            example = {str: 'a text such as "north"', float: "a number", bool: "true or false"}
            raise self.wrong(example[kind])
        self._step()
        return value

    def _expect(self, sign: str) -> None:
        if self._kind != "sign" or self.word != sign:
            raise self.wrong(repr(sign))
        self._step()

    def _step(self) -> None:
        match = _TOKEN.match(self._text, self._next)
        if match is None:
            rest = self._text[self._next :].lstrip()
            self._at = len(self._text) - len(rest)
            self.word, self._kind = rest[:1], "end" if not rest else "strange"
            self._next = len(self._text) if not rest else self._next
            if rest:
                raise self.wrong('a name, a number, a "text" or a sign (== != ~ < <= > >=)')
            return
        self._kind = match.lastgroup or ""
        self.word, self._at = match[self._kind], match.start(self._kind)
        self._next = match.end()


_NAMES = {str: "text", float: "number", bool: "flag"}


def _kind(field: str) -> type:
    return float if field in NUMBERS else bool if field in FLAGS else str


def _pattern(text: str) -> str:
    # Only the star is special: brackets and question marks stand for themselves.
    return re.sub(r"([\[?])", r"[\1]", text)


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _bracketed(part: Term) -> str:
    return f"({part})" if isinstance(part, Many) else str(part)


def select(found: Sequence[Mapping[str, Any]], where: Filter | None) -> list[Mapping[str, Any]]:
    """The facts of those devices that a filter means; None means all."""
    return [facts for facts in found if where is None or where.matches(facts)]
