"""Conditions over items, from the SQL of the index on this machine to Milvus's boolean expressions.

    condition    conjunction (OR conjunction)*
    conjunction  negation (AND negation)*
    negation     NOT* ( "(" condition ")" | test )
    test         column operator value | column [NOT] LIKE text
                 | column [NOT] IN (value, …) | column [NOT] BETWEEN value AND value

Whatever is understood means what it means in SQLite, so both homes keep the same images; everything else is refused.
SQLite's LIKE takes ASCII letters of either case for the same and Milvus's does not, so it is asked of fields that hold
the text in small letters.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from knn_diffusion.errors import UsageError
from knn_diffusion.retrieval.database import FILTER_COLUMNS, text

NUMBERS = ("added_at",)
"""Columns that hold numbers; the others hold text."""
LOWER = "_lower"
"""Ending of the field that holds a column's text in small ASCII letters."""
OPERATORS = {"=": "==", "==": "==", "!=": "!=", "<>": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
MAX_DEPTH = 30
"""Parentheses inside one another."""
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^']|'')*') | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<word>[A-Za-z_]\w*) | (?P<sign><=|>=|<>|!=|==|[=<>(),]))""",
    re.VERBOSE,
)


def milvus_expression(condition: str) -> str:
    """The expression that keeps the same images.

    Raises: UsageError for what is no condition, or is SQL beyond this grammar.
    """
    if text(condition) != condition:  # no valid UTF-8
        _refuse(condition, 0)
    return _Parser(condition, _tokens(condition)).whole()


def ascii_lower(value: str) -> str:
    """The text with ASCII letters made small and all others as they are, as SQLite's LIKE compares."""
    return value.encode().lower().decode()


def quoted(value: str) -> str:
    """The text as a literal of an expression."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    place: int


def _tokens(condition: str) -> list[_Token]:
    found, place, end = [], 0, len(condition.rstrip())
    while place < end:
        match = _TOKEN.match(condition, place)
        if match is None or match.lastgroup is None:
            _refuse(condition, place)
        found.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
        place = match.end()
    return [*found, _Token("end", "", end)]


def _refuse(condition: str, place: int, note: str = "") -> NoReturn:
    rest = condition[place:].strip()
    where = f"at {rest[:20]!r}" if rest else "at its end"
    raise UsageError(
        f"expected a condition of comparisons, LIKE, IN, BETWEEN, AND, OR, NOT and parentheses over "
        f"{', '.join(FILTER_COLUMNS)}, such as source LIKE '%fruit%', got {condition!r} (not understood {where}{note}): mend it"
    ) from None


class _Parser:
    """Recursive descent over the grammar above; every rule returns its expression."""

    def __init__(self, condition: str, tokens: list[_Token]) -> None:
        self._condition, self._tokens = condition, tokens
        self._next = self._depth = 0

    def whole(self) -> str:
        expression = self._joined("OR", lambda: self._joined("AND", self._negation))
        if self._here.kind != "end":
            self._refused()
        return expression

    @property
    def _here(self) -> _Token:
        return self._tokens[self._next]

    def _refused(self) -> NoReturn:
        _refuse(self._condition, self._here.place)

    def _take(self, kind: str, *texts: str) -> str | None:
        """The token's text if it is of that kind and, where texts are given, one of them."""
        token = self._here
        if token.kind != kind or (texts and token.text.upper() not in texts):
            return None
        self._next += 1
        return token.text

    def _need(self, kind: str, *texts: str) -> str:
        found = self._take(kind, *texts)
        return found if found is not None else self._refused()

    def _joined(self, word: str, part: Callable[[], str]) -> str:
        parts = [part()]
        while self._take("word", word):
            parts.append(part())
        return parts[0] if len(parts) == 1 else f"({f' {word.lower()} '.join(parts)})"

    def _negation(self) -> str:
        negated = False
        while self._take("word", "NOT"):
            negated = not negated
        if self._take("sign", "("):
            self._depth += 1
            if self._depth > MAX_DEPTH:
                self._refused()
            expression = self._joined("OR", lambda: self._joined("AND", self._negation))
            self._need("sign", ")")
            self._depth -= 1
        else:
            expression = self._test()
        return f"(not ({expression}))" if negated else expression

    def _test(self) -> str:
        column = self._column()
        if operator := self._take("sign", *OPERATORS):
            return f"({column} {OPERATORS[operator]} {self._value(column)})"
        negated = self._take("word", "NOT") is not None
        word = self._need("word", "LIKE", "IN", "BETWEEN").upper()
        expression = {"LIKE": self._like, "IN": self._among, "BETWEEN": self._between}[word](column)
        return f"(not {expression})" if negated else expression

    def _column(self) -> str:
        if self._here.text.lower() not in FILTER_COLUMNS:
            note = "; metadata is not sent to Milvus, filter by it in the index on this machine"
            _refuse(self._condition, self._here.place, note if self._here.kind == "word" else "")
        return self._need("word").lower()

    def _value(self, column: str) -> str:
        if column not in NUMBERS:
            return self._text()
        token, number = self._here, float(self._need("number"))
        if not math.isfinite(number):
            _refuse(self._condition, token.place)
        return repr(number + 0.0)  # -0.0 is 0.0 to SQL, and another number to Milvus' IN

    def _text(self) -> str:
        token, value = self._here, self._need("text")[1:-1].replace("''", "'")
        if any(letter < " " and letter not in "\n\r\t" for letter in value):
            _refuse(self._condition, token.place)
        return quoted(value)

    def _like(self, column: str) -> str:
        if column in NUMBERS or "\\" in self._here.text:  # a backslash means itself in SQLite and escapes in Milvus
            self._refused()
        return f"({column}{LOWER} like {ascii_lower(self._text())})"

    def _among(self, column: str) -> str:
        self._need("sign", "(")
        values = [self._value(column)]
        while self._take("sign", ","):
            values.append(self._value(column))
        self._need("sign", ")")
        return f"({column} in [{', '.join(values)}])"

    def _between(self, column: str) -> str:
        low = self._value(column)
        self._need("word", "AND")
        return f"({column} >= {low} and {column} <= {self._value(column)})"
