"""Conditions over items and their metadata: one SQL expression, which reads only their columns and ends in time.

SQLite answers them. Before, the expression is taken into words, so that it cannot be more than one, and so that a number is not
compared with a text: to SQL every number is less than every text, and `width >= 512` would hold for a width of 'unknown'.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Int

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.retrieval.database import FILTER_COLUMNS, pieces
from knn_diffusion.retrieval.identity import DATABASE

FUNCTIONS = frozenset(
    [
        "abs",
        "coalesce",
        "date",
        "datetime",
        "glob",
        "ifnull",
        "iif",
        "instr",
        "julianday",
        "length",
        "like",
        "lower",
        "ltrim",
        "max",
        "min",
        "nullif",
        "round",
        "rtrim",
        "strftime",
        "substr",
        "substring",
        "time",
        "trim",
        "typeof",
        "unicode",
        "unixepoch",
        "upper",
    ]
)
"""None of them makes much of little, as `replace` and `randomblob` do."""
MAX_LENGTH, MAX_PATTERN = 10_000, 1000
"""Letters of a condition, and of a pattern of LIKE."""
MAX_SECONDS, MAX_SECONDS_A_ROW = 10.0, 20e-6
"""Time for one condition; a plain one takes a twentieth of it."""
NAMES_SHOWN = 20
_TOKEN = re.compile(
    r"""(?P<space>\s+ | --[^\n]* | /\*.*?\*/) | (?P<text>'(?:[^']|'')*') | (?P<name>"[^"]*" | \[[^\]]*\] | `[^`]*`)
    | (?P<number>(?:0[xX][0-9a-fA-F]+ | (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?!\w)) | (?P<word>[^\W\d]\w*)
    | (?P<sign>->>|->|<=|>=|<>|!=|==|\|\||<<|>>|[=<>(),.+\-*/%&|~])""",
    re.VERBOSE | re.DOTALL,
)
_NO_EXPRESSION = frozenset(("SELECT", "VALUES"))
_BEFORE_GROUP = frozenset(
    ["AND", "OR", "NOT", "BETWEEN", "IS", "LIKE", "GLOB", "ESCAPE", "CASE", "WHEN", "THEN", "ELSE", "DISTINCT", "FROM"]
)
"""Words after which parentheses hold a part of an expression; after others they hold what a function takes."""
_COMPARE = frozenset(("=", "==", "!=", "<>", "<", "<=", ">", ">=", "IS"))
_COMPUTE = frozenset(("+", "-", "*", "/", "%", "&", "|", "~", "<<", ">>", "||", "->", "->>", "COLLATE"))
_TICKS = 1000
"""Steps of SQLite's machine between two looks at the clock."""


def rows_where(database: sqlite3.Connection, condition: str, names: Sequence[str] = ()) -> Int[np.ndarray, "some"]:
    """The rows whose item fulfils an SQL condition over FILTER_COLUMNS; it can read nothing else and write nothing.

    Args:
        names: of metadata, which are columns too; identifiers.

    Raises: UsageError when it is no such condition, compares numbers with texts, or takes too long; StoreError when metadata
        is damaged.
    """
    tokens = _tokens(condition, names)
    words = {_plain(token) for token in tokens}
    used = [name for name in names if name.lower() in words]
    view = "described"
    while view in condition.lower():  # so that the condition cannot name it, and read what only the view may
        view += "_"
    described, items = (_described(view, used), f"{view} AS items") if used else ("", "items")
    mixed = list(_mixed(condition, tokens, names))
    values = "".join(f", CASE WHEN {one.sql} THEN {one.column} END" for one in mixed)
    also = "".join(f" OR ({one.sql})" for one in mixed)
    database.set_authorizer(partial(_only_conditions, view))
    try:
        with _in_time(database, condition):
            found = database.execute(
                f"{described}SELECT row{values} FROM {items} WHERE ({condition}\n){also}"
            ).fetchall()
    except (sqlite3.Error, sqlite3.Warning, UnicodeError) as error:
        database.set_authorizer(None)
        if used and database.execute("SELECT 1 FROM metadata WHERE NOT json_valid(facts) LIMIT 1").fetchone():
            raise StoreError(f"{DATABASE} holds damaged metadata: restore a copy or build the index again") from None
        raise _refused(condition, str(error), names) from None
    finally:
        database.set_authorizer(None)
    for number, one in enumerate(mixed, 1):
        _refuse_mixed(database, condition, one, {row[0]: row[number] for row in found if row[number] is not None})
    return np.array([row for row, *wrong in found if all(value is None for value in wrong)], np.int64)


# Words


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    place: int = 0


def _tokens(condition: str, names: Sequence[str]) -> list[_Token]:
    """The words of the condition. Raises: UsageError for what cannot be one expression."""
    if len(condition) > MAX_LENGTH:
        raise UsageError(f"expected a condition of at most {MAX_LENGTH:,} letters, got {len(condition):,}: shorten it")
    found, place, depth = list[_Token](), 0, 0
    while place < len(condition):
        match = _TOKEN.match(condition, place)
        if match is None or match.lastgroup is None:
            raise _refused(condition, f"not understood at {condition[place : place + 20]!r}", names)
        token, place = _Token(match.lastgroup, match[match.lastgroup], place), match.end()
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        if depth < 0 or (token.kind == "word" and token.text.upper() in _NO_EXPRESSION):
            raise _refused(condition, f"one expression, it goes on at {condition[token.place :][:20]!r}", names)
        if token.kind != "space":
            found.append(token)
    columns = {name.lower() for name in ("row", "items", *FILTER_COLUMNS, *names)}
    for (
        token
    ) in found:  # SQLite takes such a name for a text, and the condition for one that holds for all images or none
        if token.text.startswith('"') and _plain(token) not in columns:
            raise _refused(condition, f"no such column: {token.text}; texts stand in single quotes", names)
    return found


def _plain(token: _Token) -> str:
    """What the token may name, in small letters."""
    return (token.text[1:-1] if token.kind == "name" else token.text).lower()


# Numbers and texts


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Something that a comparison would take wrongly: an SQL condition that holds for such images, and of which column."""

    sql: str
    column: str
    against: str


def _mixed(condition: str, tokens: list[_Token], names: Sequence[str]) -> Iterator[_Mixed]:
    """What must not hold for any image. Raises: UsageError where a column of the store's own is compared wrongly."""
    spelled = {name.lower(): f'"{name}"' for name in names}
    for pair in _compared(_bare(tokens)):
        for one, other in (pair, pair[::-1]):
            if one.kind == "column" and one.text in FILTER_COLUMNS:
                _refuse_own(condition, one.text, other)
            elif one.kind == "column" and other.kind in ("number", "text") and (name := spelled.get(one.text)):
                held = "= 'text'" if other.kind == "number" else "IN ('integer', 'real')"
                yield _Mixed(f"typeof({name}) {held}", name, other.kind)
        columns = [spelled[one.text] for one in pair if one.kind == "column" and one.text in spelled]
        if len(columns) == 2:
            one_name, other_name = columns
            both = f"{one_name} IS NOT NULL AND {other_name} IS NOT NULL"
            differ = f"(typeof({one_name}) = 'text') <> (typeof({other_name}) = 'text')"
            yield _Mixed(f"{both} AND {differ}", one_name, f"value of {other_name}")


def _refuse_own(condition: str, column: str, other: _Token) -> None:
    """Columns of the store's own hold texts, `added_at` seconds."""
    if column == "added_at" and other.kind == "text" and not _is_number(other.text[1:-1]):
        cure = "compare it with a number, or with unixepoch('2025-01-31')"
        raise UsageError(f"{condition!r}: added_at holds seconds since 1970, {other.text} is a text: {cure}")
    if column != "added_at" and other.kind == "number":
        raise UsageError(f"{condition!r}: {column} holds texts, {other.text} is a number: write '{other.text}'")


def _refuse_mixed(database: sqlite3.Connection, condition: str, one: _Mixed, found: dict[int, object]) -> None:
    """Raise UsageError if any of these rows is not removed."""
    live = list[int]()
    for some in pieces(list(found)):
        sql = f"SELECT row FROM items WHERE deleted_at IS NULL AND row IN ({','.join('?' * len(some))})"
        live += [row for (row,) in database.execute(sql, some)]
    if not live:
        return
    column, example = one.column.strip('"'), found[min(live)]
    held = f"text {example!r}" if isinstance(example, str) else f"number {example!r}"
    wanted = "TEXT" if one.against == "text" else "REAL"
    cure = (
        f"NULLIF({column}, {example!r}) leaves it out, " if isinstance(example, str) and one.against == "number" else ""
    )
    raise UsageError(
        f"{condition!r}: expected {column} not to be a {held.partition(' ')[0]} where it is compared with a {one.against}, it is the "
        f"{held} for one of {len(live):,} images: {cure}CAST({column} AS {wanted}) takes it for a {'text' if wanted == 'TEXT' else 'number'}"
    )


def _is_number(value: str) -> bool:
    try:
        return not math.isnan(float(value))
    except ValueError:
        return False


def _bare(tokens: list[_Token]) -> list[_Token]:
    """The words with names as columns, signs joined to their numbers, and no parentheses around a single one."""
    bare = list[_Token]()
    for token in tokens:
        before = bare[-1] if bare else None
        if before and before.text in ("-", "+") and token.kind == "number" and _opens(bare[:-1]):
            bare[-1] = _Token("number", before.text + token.text)
        elif before and before.text == "." and token.kind in ("word", "name"):
            bare[-2:] = [_Token("column", _plain(token))]
        elif token.text == ")" and len(bare) > 1 and bare[-2].text == "(" and _opens(bare[:-2], within=True):
            bare[-2:] = bare[-1:]
        elif token.kind == "name" or (token.kind == "word" and token.text.upper() not in _WORDS):
            bare.append(_Token("column", _plain(token)))
        else:
            bare.append(token)
    return bare


def _opens(before: list[_Token], *, within: bool = False) -> bool:
    """Whether an operand begins after these; or, `within` parentheses, whether they only group."""
    if not before or before[-1].text in _COMPARE | {"(", ","}:
        return True
    return before[-1].kind == "word" and before[-1].text.upper() in _BEFORE_GROUP | (frozenset() if within else {"IN"})


def _compared(tokens: list[_Token]) -> Iterator[tuple[_Token, _Token]]:
    """Pairs of a column and what it is compared with, as far as both stand there by themselves."""
    ends = [_END, *tokens, _END, _END, _END]

    def simple(place: int) -> _Token:
        """The operand there, or what is none where it is part of a computation."""
        parted = {ends[place - 1].text.upper(), ends[place + 1].text.upper()} & _COMPUTE
        return ends[place] if not parted else _END

    for place in range(1, len(tokens) + 1):
        word = ends[place].text.upper()
        left = place - 1 - (ends[place - 1].text.upper() == "NOT")
        if word in _COMPARE:
            yield simple(left), simple(place + 1 + (ends[place + 1].text.upper() == "NOT"))
        elif word == "BETWEEN":
            yield simple(left), simple(place + 1)
            last = next((n for n in range(place + 1, len(ends)) if ends[n].text.upper() == "AND"), len(tokens) + 1)
            yield simple(left), simple(last + 1)
        elif word == "IN":
            last = next((n for n in range(place, len(ends)) if ends[n].text == ")"), place)
            yield from ((simple(left), simple(other)) for other in range(place + 1, last))


_END = _Token("end", "")
_WORDS = _BEFORE_GROUP | {"IN", "NULL", "TRUE", "FALSE", "END", "CAST", "AS", "COLLATE", "ISNULL", "NOTNULL"}


# SQLite


@contextmanager
def _in_time(database: sqlite3.Connection, condition: str) -> Iterator[None]:
    """A block whose statements are stopped when they take too long, and by Ctrl-C."""
    rows = database.execute("SELECT max(row) FROM items").fetchone()[0] or 0
    seconds = MAX_SECONDS + MAX_SECONDS_A_ROW * rows
    end, stopped = time.monotonic() + seconds, list[BaseException]()

    def look() -> bool:
        try:
            return time.monotonic() > end
        except BaseException as error:  # Ctrl-C, which SQLite would swallow
            stopped.append(error)
            return True

    patterns = database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN)
    database.set_progress_handler(look, _TICKS)
    try:
        yield
    except sqlite3.OperationalError as error:
        if stopped:
            raise stopped[0] from None
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            raise UsageError(f"{condition!r} was not answered in {seconds:.0f} seconds: make it simpler") from None
        raise
    finally:
        database.set_progress_handler(None, 0)
        database.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, patterns)


def _refused(condition: str, reason: str, names: Sequence[str]) -> UsageError:
    known = [*FILTER_COLUMNS, *names[:NAMES_SHOWN], *(["…"] if len(names) > NAMES_SHOWN else [])]
    return UsageError(
        f"expected a condition over {', '.join(known)}, such as source LIKE '%fruit%', got {condition[:200]!r} ({reason}): mend it"
    )


def _described(view: str, names: Sequence[str]) -> str:
    """The beginning of a query of items with their metadata as columns; SQLite takes apart only those that are asked for."""
    columns = [f"items.{column}" for column in ("row", *FILTER_COLUMNS)]
    columns += [f'json_extract(metadata.facts, \'$."{name}"\') AS "{name}"' for name in names]
    joined = f"SELECT {', '.join(columns)} FROM items LEFT JOIN metadata ON metadata.row = items.row"
    return f"WITH {view} AS ({joined}) "


def _only_conditions(
    view: str, action: int, table: str | None, column: str | None, database: str | None, inside: str | None
) -> int:
    """SQLite's question whether the statement may do that, answered so that a filter only compares items' fields.

    Metadata as a whole is read only inside the view, and by its function alone.
    """
    of_items = table == "items" and column in (*FILTER_COLUMNS, "row")
    of_metadata = table == "metadata" and column in ("facts", "row") and inside == view
    counts = table in ("items", "metadata") and column == ""  # that there are rows, but no values
    reads = action == sqlite3.SQLITE_READ and (of_items or of_metadata or counts)
    computes = action == sqlite3.SQLITE_FUNCTION and (
        column in FUNCTIONS or (column == "json_extract" and inside == view)
    )
    allowed = reads or computes or action == sqlite3.SQLITE_SELECT
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY
