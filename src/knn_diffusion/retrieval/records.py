"""Rows and records: a row is a place among the images on the disk, a record is an image's number in the database.

A record is given once and never again. Rows are numbered anew when a compaction takes removed images off the disk: row r
is then the record with r others before it that are still there. What was purged is kept as runs of records.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int64


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Records:
    """The records that are no longer on the disk, as runs in ascending order that do not touch."""

    firsts: Int64[np.ndarray, "runs"]
    counts: Int64[np.ndarray, "runs"]

    @classmethod
    def complete(cls) -> Records:
        """Nothing was ever purged: every row is its own record."""
        return cls(firsts=np.zeros(0, np.int64), counts=np.zeros(0, np.int64))

    @property
    def num_purged(self) -> int:
        """How many records are gone."""
        return int(self.counts.sum())

    def of_rows(self, rows: Int[np.ndarray, "rows"]) -> Int64[np.ndarray, "rows"]:
        """The record of each row."""
        if not len(self.firsts):
            return rows.astype(np.int64)
        before = self._gone_before()
        runs = np.searchsorted(self.firsts - before[:-1], rows, side="right")
        return rows.astype(np.int64) + before[runs]

    def rows_of(self, records: Int[np.ndarray, "*records"]) -> Int64[np.ndarray, "*records"]:
        """The row of each record, -1 for one that was purged."""
        if not len(self.firsts):
            return records.astype(np.int64)
        runs = np.searchsorted(self.firsts, records, side="right")
        rows = records.astype(np.int64) - self._gone_before()[runs]
        ends = np.concatenate([np.zeros(1, np.int64), self.firsts + self.counts])[runs]
        return np.where(records < ends, -1, rows)

    def row_from(self, record: int) -> int:
        """The first row whose record is this or a later one."""
        if not len(self.firsts):
            return record
        return record - int(np.clip(record - self.firsts, 0, self.counts).sum())

    def spread(self, mask: Bool[np.ndarray, "rows"]) -> Bool[np.ndarray, "records"]:
        """A mask of rows as one of records, False for those that were purged."""
        if not len(self.firsts):
            return mask
        return np.insert(mask, np.repeat(self.firsts - self._gone_before()[:-1], self.counts), False)

    def without(self, records: Int64[np.ndarray, "records"]) -> Records:
        """What is left when these are purged too. They are given in ascending order, none is gone already."""
        starts = np.flatnonzero(np.diff(records, prepend=-2) != 1)
        firsts = np.concatenate([self.firsts, records[starts]])
        counts = np.concatenate([self.counts, np.diff(starts, append=len(records))])
        order = np.argsort(firsts)
        firsts, counts = firsts[order], counts[order]
        begins = np.concatenate([np.ones(1, bool), firsts[1:] != (firsts + counts)[:-1]])[: len(firsts)]
        joined = np.add.reduceat(counts, np.flatnonzero(begins)) if len(counts) else counts
        return Records(firsts=firsts[begins], counts=joined)

    def digest(self) -> str:
        """SHA-256 over the runs."""
        return hashlib.sha256(np.stack([self.firsts, self.counts]).astype("<i8").tobytes()).hexdigest()

    def _gone_before(self) -> Int64[np.ndarray, "runs_and_one"]:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
