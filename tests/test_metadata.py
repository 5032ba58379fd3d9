"""Metadata of one's own: kept with the images, filtered by as a list of dictionaries would be, and nothing else is read."""

from __future__ import annotations

import math
import operator
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store_world import TOY, batch, id_of

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.retrieval import condition as condition_module
from knn_diffusion.retrieval import store as store_module
from knn_diffusion.retrieval.metadata import column_names
from knn_diffusion.retrieval.segments import CompactedError
from knn_diffusion.retrieval.store import Item, Store

FACTS: list[dict[str, Any]] = [
    {"licence": "CC0", "width": 640, "punsafe": 0.01, "animated": False},
    {"licence": "CC-BY", "width": 512},
    {},
    {"licence": "cc0", "width": 1024, "animated": True},
    {"width": 2000, "punsafe": 1},
]


def described(metadata: Sequence[Mapping[str, Any]], first: int = 0) -> tuple[Any, ...]:
    items, *rest = batch(range(first, first + len(metadata)))
    named = [
        Item(source=item.source, key=item.key, content=item.content, metadata=one)
        for item, one in zip(items, metadata, strict=True)
    ]
    return (named, *rest)


def filled(folder: Path | None, metadata: Sequence[Mapping[str, Any]] = FACTS) -> Store:
    store = Store.create(folder, TOY)
    store.append(*described(metadata))
    return store


def matching(store: Store, where: str) -> list[int]:
    return np.flatnonzero(store.matching(where)).tolist()


def changed(folder: Path, *statements: str) -> None:
    raw = sqlite3.connect(folder / "store.sqlite")
    for statement in statements:
        raw.execute(statement)
    raw.commit()
    raw.close()


# Kept


def test_metadata_comes_back_after_reopening(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    for read_only in (False, True):
        with Store.open(tmp_path / "index", read_only=read_only) as store:
            assert store.metadata(np.array([4, 0, 2])) == [FACTS[4], FACTS[0], {}]
            assert [item.metadata for item in store.items(np.arange(5))] == FACTS
            assert isinstance(store.metadata(np.array([3]))[0]["animated"], bool)
            assert store.problems() == []


def test_numbers_of_numpy_are_kept_as_plain_ones_and_none_is_left_out() -> None:
    with filled(None, [{"a": np.int64(3), "b": np.float32(0.5), "c": np.bool_(True), "d": None}, {"d": None}]) as store:
        assert store.metadata(np.arange(2)) == [{"a": 3, "b": 0.5, "c": True}, {}]
        with pytest.raises(UsageError, match="no such column: d"):
            store.matching("d = 1")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a b": 1}, "expected names of metadata like width or punsafe_2, got 'a b': rename it"),
        ({"1st": 1}, "got '1st': rename it"),
        ({'a"': 1}, "got 'a\"': rename it"),
        ({"breite\n": 1}, "got 'breite.n': rename it"),
        ({"größe": 1}, "got 'größe': rename it"),
        ({"Source": 1}, "expected names of metadata that are not the store's own, got 'Source': rename it"),
        ({"Width": 1, "width": 1}, "that differ in more than case, got Width, width: rename one"),
        ({"a": math.nan}, "metadata a: expected a text, a finite number of 64 bits, True or False, got nan: leave it out"),
        ({"a": np.float32(np.inf)}, "got .*inf.*: leave it out"),
        ({"a": 2**63}, "got 9223372036854775808: leave it out"),
        ({"a": [1]}, r"got \[1\]: leave it out or write it as a text"),
        ({"a": {"b": 1}}, "got {'b': 1}: leave it out"),
        ({"a": b"x"}, "got b'x': leave it out"),
        ({f"n{n}": 1 for n in range(60)}, "expected at most 64 names of metadata in an index, got one more, 'n59': leave"),
    ],
)  # fmt: skip
def test_what_cannot_be_metadata_is_refused_and_nothing_is_added(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with filled(tmp_path / "index") as store:
        with pytest.raises(UsageError, match=message) as raised:
            store.append(*described([{"fine": 1}, metadata], first=10))
        assert "\n" not in str(raised.value)
        assert len(store) == 5
        assert store.problems() == []
        with pytest.raises(UsageError, match="no such column: fine"):
            store.matching("fine = 1")


def test_a_name_is_the_same_in_any_case_and_keeps_its_first_spelling() -> None:
    with filled(None, [{"NSFW": 1}]) as store:
        store.append(*described([{"nsfw": 2, "Order": 3}, {"ORDER": 4}], first=5))
        assert store.metadata(np.arange(3)) == [{"NSFW": 1}, {"NSFW": 2, "Order": 3}, {"Order": 4}]
        assert matching(store, "nsfw >= 1") == [0, 1]
        assert matching(store, 'Nsfw > 1 AND "order" = 3') == [1]


def test_images_with_and_without_metadata_stand_side_by_side(tmp_path: Path) -> None:
    with Store.create(tmp_path / "index", TOY) as store:
        store.append(*batch(range(3)))
        store.append(*described([{"width": 5}], first=3))
        store.append(*batch(range(4, 6)))
        assert store.metadata(np.arange(6)) == [{}, {}, {}, {"width": 5}, {}, {}]
        assert matching(store, "width = 5 OR key = '4.png'") == [3, 4]
        assert store.problems() == []


def test_a_store_of_before_works_and_gets_its_table_when_it_is_changed(tmp_path: Path) -> None:
    with Store.create(tmp_path / "index", TOY) as store:
        store.append(*batch(range(2)))
    changed(tmp_path / "index", "DROP TABLE metadata")
    with Store.open(tmp_path / "index", read_only=True) as store:
        assert store.metadata(np.arange(2)) == [{}, {}]
        assert matching(store, "key = '1.png'") == [1]
        assert store.problems() == []
    with Store.open(tmp_path / "index") as store:
        store.append(*described([{"width": 5}], first=2))
        assert matching(store, "width = 5") == [2]
        assert store.problems() == []


def test_a_read_only_store_takes_metadata_in_memory(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    with Store.open(tmp_path / "index", read_only=True) as store:
        store.append(*described([{"height": 7}], first=5))
        assert matching(store, "height = 7 OR width = 512") == [1, 5]
    with Store.open(tmp_path / "index") as store, pytest.raises(UsageError, match="no such column: height"):
        store.matching("height = 7")


def test_another_process_sees_new_names_at_once(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as writer, Store.open(tmp_path / "index") as reader:
        assert matching(reader, "width = 512") == [1]
        writer.append(*described([{"height": 7}], first=5))
        assert matching(reader, "height = 7") == [5]


def test_a_compaction_keeps_the_metadata_of_what_stays(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        old = store.snapshot()
        store.remove([id_of(0), id_of(2)])
        assert store.metadata(np.arange(2), old) == FACTS[:2], "a removed image is as it was for who saw it"
        assert matching(store, "licence = 'CC0'") == []
        store.compact()
        assert store.metadata(np.arange(3)) == [FACTS[1], FACTS[3], FACTS[4]]
        with pytest.raises(CompactedError):
            store.metadata(np.arange(2), old)
        assert matching(store, "width > 600") == [1, 2]
        assert store.problems() == []
        assert store.live.query("SELECT row FROM metadata") == [(1,), (3,), (4,)]
        store.append(*described([{"width": 1}], first=0))
        assert store.metadata(np.arange(4))[3] == {"width": 1}


def test_a_copy_has_the_metadata_and_only_its_own(tmp_path: Path) -> None:
    with filled(tmp_path / "index") as store:
        store.append(*described([{"gone": 1}], first=5))
        store.remove([id_of(5), id_of(1)])
        store.copy_to(tmp_path / "copy", sealed=True)
    with Store.open(tmp_path / "copy") as copy:
        assert copy.metadata(np.arange(4)) == [FACTS[0], *FACTS[2:]]
        assert copy.problems() == []
        with pytest.raises(UsageError, match="no such column: gone"):
            copy.matching("gone = 1")


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE metadata SET facts = replace(facts, '640', '641') WHERE row = 0",
        "UPDATE metadata SET row = 2 WHERE row = 0",
        "UPDATE metadata SET facts = x'00' WHERE row = 0",
        "UPDATE metadata SET crc32 = 'x' WHERE row = 0",
    ],
)
def test_damaged_metadata_is_noticed_when_it_is_read_and_by_the_check(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "index").close()
    changed(tmp_path / "index", damage)
    with Store.open(tmp_path / "index") as store:
        (problem,) = store.problems()
        assert "the metadata of row" in problem
        with pytest.raises(
            StoreError, match=r"the metadata of row \d is damaged: restore a copy or build the index again"
        ):
            store.metadata(np.arange(5))


@pytest.mark.parametrize("damage", ["DELETE FROM metadata WHERE row = 1", "DROP TABLE metadata"])
def test_lost_metadata_is_noticed_by_the_check(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "index").close()
    changed(tmp_path / "index", damage)
    with Store.open(tmp_path / "index") as store:
        left = "3" if "DELETE" in damage else "none"
        assert store.problems() == [f"store.sqlite: expected metadata of 4 images, found {left}"]


def test_a_condition_over_damaged_metadata_does_not_blame_the_condition(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    changed(tmp_path / "index", "UPDATE metadata SET facts = '{\"width' WHERE row = 1")
    with Store.open(tmp_path / "index") as store:
        with pytest.raises(StoreError, match="holds damaged metadata: restore a copy or build the index again"):
            store.matching("width > 5")
        assert matching(store, "key = '1.png'") == [1]


def test_names_are_signed(tmp_path: Path) -> None:
    filled(tmp_path / "index").close()
    changed(
        tmp_path / "index", "UPDATE settings SET value = replace(value, 'width', 'wodth') WHERE name = 'metadata_names'"
    )
    with pytest.raises(StoreError, match="damaged"):
        Store.open(tmp_path / "index")


# Filters

NAMES = ("licence", "width", "Punsafe", "animated")
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3)
values = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3), st.floats(-2, 2, width=16), st.booleans(), texts
)
rows = st.lists(st.dictionaries(st.sampled_from(NAMES), values), min_size=1, max_size=8)
Test = Callable[[Mapping[str, Any]], bool | None]
Condition = tuple[str, Test, set[tuple[str, type]]]
"""SQL, the same in Python, and which names it compares with which kind of value."""
OPERATORS = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge
}  # fmt: skip


def kind(value: Any) -> type:
    return str if isinstance(value, str) else int


def ordered(value: Any) -> Any:
    """As SQL orders: texts by their bytes."""
    return value.encode() if isinstance(value, str) else value


def literal(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


@st.composite
def comparisons(draw: st.DrawFn) -> Condition:
    name, value = draw(st.sampled_from(NAMES)), draw(values)
    if draw(st.booleans()):
        return f"{name.upper()} IS NULL", lambda row: row.get(name) is None, set()
    sign = draw(st.sampled_from(sorted(OPERATORS)))

    def compare(row: Mapping[str, Any]) -> bool | None:
        found = row.get(name)
        if found is None or kind(found) is not kind(value):
            return None
        return OPERATORS[sign](ordered(found), ordered(value))

    compared = set() if isinstance(value, bool) else {(name.lower(), kind(value))}
    return f"{name.lower()} {sign} {literal(value)}", compare, compared


def negated(test: Condition) -> Condition:
    def opposite(row: Mapping[str, Any]) -> bool | None:
        found = test[1](row)
        return None if found is None else not found

    return f"NOT ({test[0]})", opposite, test[2]


def both(one: Condition, other: Condition) -> Condition:
    def conjunction(row: Mapping[str, Any]) -> bool | None:
        found = one[1](row), other[1](row)
        return False if False in found else None if None in found else True

    return f"({one[0]}) AND ({other[0]})", conjunction, one[2] | other[2]


conditions = st.recursive(
    comparisons(), lambda inner: st.one_of(inner.map(negated), st.tuples(inner, inner).map(lambda pair: both(*pair)))
)


@settings(max_examples=80, deadline=None)
@given(facts=rows, condition=conditions)
@example(
    facts=FACTS,
    condition=("WIDTH >= 512 AND licence = 'CC0'", lambda row: row is FACTS[0], {("width", int), ("licence", str)}),
)
def test_a_condition_keeps_what_python_keeps_and_compares_no_number_with_a_text(
    facts: list[dict[str, Any]], condition: Condition
) -> None:
    where, keeps, compared = condition
    known = dict.fromkeys(NAMES, "")
    with filled(None, [*facts, known]) as store:
        store.remove([store.facts(np.array([len(facts)]))[0][0]])  # it made all names known
        held = {(name.lower(), kind(value)) for row in facts for name, value in row.items()}
        if any((name.lower(), str if one is int else int) in held for name, one in compared):
            with pytest.raises(UsageError, match=r"expected .* not to be a (text|number) where it is compared with a"):
                matching(store, where)
        else:
            assert matching(store, where) == [number for number, row in enumerate(facts) if keeps(row)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("licence LIKE 'cc0'", [0, 3]),
        ("width BETWEEN 512 AND 640 AND source LIKE 'photos/%'", [0, 1]),
        ("animated", [3]),
        ("animated = FALSE", [0]),
        ("punsafe IS NULL", [1, 2, 3]),
        ("NOT punsafe > 0.5", [0]),
        ('"width" = 512', [1]),
        ("items.key = '2.png' AND licence IS NULL", [2]),
        ("id IN ('a', 'b') OR key IN ('1.png')", [1]),
        ("licence = 'described' OR width = 512", [1]),
        ("coalesce(width, 0) = 0 -- nothing", [2]),
    ],
)
def test_names_of_metadata_are_columns_beside_the_stores_own(where: str, expected: list[int]) -> None:
    with filled(None) as store:
        assert matching(store, where) == expected


@pytest.mark.parametrize(
    "where",
    [
        "widht >= 512",
        '"widht" >= 512',
        'licence = "CC0"',
        "deleted_at IS NULL",
        "content = x'00'",
        "facts LIKE '%'",
        "metadata.facts LIKE '%'",
        "(SELECT facts FROM metadata) LIKE '%'",
        "(SELECT count(*) FROM settings) > 0",
        "width IN (SELECT crc32 FROM metadata)",
        "1) UNION SELECT row FROM metadata WHERE (1",
        "1) UNION SELECT value FROM settings WHERE (1",
        "row IN (WITH described AS (SELECT row, facts FROM metadata) SELECT row FROM described)",
        "row IN (WITH described_ AS (SELECT row, facts FROM metadata) SELECT row FROM described_)",
        "row IN (SELECT row FROM (SELECT row, facts FROM metadata) AS described)",
        "row IN (SELECT row FROM described)",
        "row IN (SELECT row FROM previews)",
        "row IN (SELECT value FROM json_each('[1]'))",
        "row IN (SELECT rowid FROM sqlite_master)",
        "1); DELETE FROM metadata; --",
        "load_extension('x')",
        "json_extract('{', '$.a') = 1",
        "id IN (SELECT id FROM items)",
        "width IN (VALUES (512))",
        "width = ?",
        "width = :width",
        "1; SELECT 1",
        "1) OR (1",
        "(1))",
        "row IN json_each('[1]')",
        "row IN purged",
        "length(randomblob(1000)) > 5",
        "length(zeroblob(1000)) > 5",
        "length(replace(source, 'p', 'pp')) > 5",
        "printf('%9d', 5) = ''",
        "length(group_concat(source)) > 5",
        "source REGEXP 'a'",
        "width = 'unclosed",
        "source LIKE '" + "%" * 1001 + "'",
    ],
)
def test_a_condition_reads_nothing_but_its_columns(where: str) -> None:
    with filled(None) as store:
        message = r"expected a condition over id, source, key, added_at, licence, width, punsafe, animated, such as .*: mend it"
        with pytest.raises(UsageError, match=message) as raised:
            store.matching(where)
        assert "\n" not in str(raised.value)
        assert store.metadata(np.arange(5)) == FACTS


MIXED = [
    {"width": 300, "height": 1, "tag": "a"},
    {"width": 640, "height": 2, "tag": 5},
    {"width": "unknown", "height": 3},
    {},
]


@pytest.mark.parametrize(
    "where",
    [
        "width >= 512", "width<512", "WIDTH != 300", "512 <= width", "(width) >= 512", "((width)) > +5", "width > -5",
        'items."width" > 1', "[width] > .5", "`width` = 1e3", "NOT width >= 512", "height = 1 OR width > 0x10",
        "width BETWEEN 1 AND 700", "width NOT BETWEEN 1 AND (700)", "width IN (300, 640)", "width NOT IN (300)", "width IS 300",
        "width IS NOT 300", "width = '640'", "tag = 'a'", "tag IN ('a', 'b')", "height = '1'", "height LIKE '1' OR tag = 5",
        "width > height", "height < (width)", "tag = width", "width /* px */ >= -- wide\n 512",
    ],
)  # fmt: skip
def test_a_comparison_of_numbers_with_texts_is_refused_however_it_is_written(where: str) -> None:
    with (
        filled(None, MIXED) as store,
        pytest.raises(UsageError, match=r"not to be a (text|number) where it is compared"),
    ):
        store.matching(where)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("NULLIF(width, 'unknown') >= 512", [1]),
        ("CAST(width AS REAL) >= 512", [1]),
        ("CAST(tag AS TEXT) = '5'", [1]),
        ("width LIKE 'un%'", [2]),
        ("typeof(width) = 'text'", [2]),
        ("width IS NULL", [3]),
        ("height >= 2", [1, 2]),
        ("height * 2 = 4 AND height + 1 > 2", [1]),
        ("coalesce(height, 9) > 8", [3]),
        ("key = '1.png'", [1]),
        ("added_at > 5 AND added_at < '1e300'", [0, 1, 2, 3]),
    ],
)
def test_what_compares_like_with_like_is_answered(where: str, expected: list[int]) -> None:
    with filled(None, MIXED) as store:
        assert matching(store, where) == expected


def test_the_message_shows_a_value_and_conditions_that_work() -> None:
    with filled(None, MIXED) as store, pytest.raises(UsageError) as raised:
        store.matching("width >= 512")
    assert str(raised.value) == (
        "'width >= 512': expected width not to be a text where it is compared with a number, it is the text 'unknown' for one of "
        "1 images: NULLIF(width, 'unknown') leaves it out, CAST(width AS REAL) takes it for a number"
    )


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("key = 5", "key holds texts, 5 is a number: write '5'"),
        ("100 < key", "key holds texts, 100 is a number"),
        ("id IN (1, 2)", "id holds texts, 1 is a number"),
        ("added_at > '2025-01-31'", "added_at holds seconds since 1970, '2025-01-31' is a text"),
    ],
)
def test_the_stores_own_columns_are_compared_with_their_kind(where: str, text: str) -> None:
    with filled(None) as store, pytest.raises(UsageError, match=re.escape(text)):
        store.matching(where)


def test_texts_of_removed_images_do_not_stop_a_comparison_of_numbers() -> None:
    with filled(None, MIXED) as store:
        store.remove([store.facts(np.array([2]))[0][0]])
        assert matching(store, "width >= 512") == [1]


SLOW = " AND ".join(f"trim(lower(source), '{n}') != upper(source)" for n in range(200))


@pytest.mark.parametrize("where", [None, "folder"])
def test_a_condition_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    monkeypatch.setattr(condition_module, "MAX_SECONDS", 0.0)
    with filled(tmp_path / where if where else None, [{}] * 200) as store:
        with pytest.raises(UsageError, match=r"was not answered in 0 seconds: make it simpler"):
            store.matching(SLOW)
        monkeypatch.undo()
        assert len(matching(store, SLOW)) == 200


def test_an_interruption_reaches_a_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        calls = 0

        def monotonic(self) -> float:
            self.calls += 1
            if self.calls > 1:
                raise KeyboardInterrupt
            return 0.0

    with filled(None, [{}] * 200) as store:
        monkeypatch.setattr(condition_module, "time", Clock())
        with pytest.raises(KeyboardInterrupt):
            store.matching(SLOW)


def test_a_condition_of_endless_length_is_refused() -> None:
    with filled(None) as store, pytest.raises(UsageError, match=r"at most 10,000 letters, got 15,001: shorten it"):
        store.matching("1" + " OR 1" * 3000)


def test_conditions_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_begun = threading.Barrier(2, timeout=30)
    real = store_module.rows_where

    def together(*given: Any) -> np.ndarray:
        both_begun.wait()
        return real(*given)

    monkeypatch.setattr(store_module, "rows_where", together)
    with filled(tmp_path / "store") as store, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(matching, store, "width >= 512") for _ in range(2)]
        assert [one.result(30) for one in asked] == [[0, 1, 3, 4]] * 2


def test_of_many_names_an_error_lists_the_first_twenty() -> None:
    with filled(None, [{f"n{n}": n for n in range(30)}]) as store:
        assert matching(store, "n29 = 29") == [0]
        with pytest.raises(UsageError, match=r"n18, n19, …, such as"):
            store.matching("n30 = 1")


# Tables of others


def test_columns_get_names_that_conditions_can_use() -> None:
    given = ("width", "WIDTH", "image size (px)", "2nd", "", "content", "größe")
    assert list(column_names(given, ("url",)).values()) == [
        "width", "WIDTH_", "image_size__px_", "_2nd", "_", "content_", "gr__e"
    ]  # fmt: skip
    assert column_names(("URL",), ("url",)) == {"URL": "URL_"}


def test_a_slow_condition_holds_up_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = store_module.rows_where

    def slow(*given: Any) -> np.ndarray:
        begun.set()
        assert go_on.wait(30)
        return real(*given)

    monkeypatch.setattr(store_module, "rows_where", slow)
    with filled(tmp_path / "store") as store:
        found: list[list[int]] = []
        asking = threading.Thread(target=lambda: found.append(matching(store, "width >= 512")))
        asking.start()
        assert begun.wait(30)
        try:  # while the condition is being answered
            store.append(*described([{"width": 600}], first=5))
            assert len(store) == 6
            assert store.metadata(np.array([5])) == [{"width": 600}]
            store.remove([store.facts(np.array([1]))[0][0]])
        finally:
            go_on.set()
        asking.join(30)
        assert found == [[0, 1, 3, 4]]  # as the images were when it was asked
        assert matching(store, "width >= 512") == [0, 3, 4, 5]
    assert not (tmp_path / "store" / "store.sqlite-wal").exists()
