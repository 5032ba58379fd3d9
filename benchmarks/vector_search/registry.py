"""Every system that can be asked for, by the name of its row."""

from __future__ import annotations

from vector_search.ours import Ours, reach
from vector_search.peers import Lance, Usearch
from vector_search.systems import Exact, Paper, System

PAPER_CODES_PER_CELL = 3_050
"""400 million images in 131,072 cells (A.3)."""

SAME_PROBES, FAR = reach(20, 6), reach(112, 20)
FAST_SCAN = (SAME_PROBES, reach(64, 10), FAR, reach(256, 20))
SMALL = (reach(20, 10), reach(64, 20), reach(112, 30))

_ALL: tuple[System, ...] = (
    Exact(),
    Paper(),
    Ours("ours-paper", "paper", (reach(20, 1),)),
    Ours("sq8", "sq8", (reach(20, 2), reach(128, 2))),
    Ours("fast-scan", "fast-scan", FAST_SCAN),
    Ours("fast-scan-ram", "fast-scan", FAST_SCAN, rows="ram", built="fast-scan"),
    Ours("fast-scan-cold", "fast-scan", (SAME_PROBES, FAR), rows="cold", built="fast-scan"),
    Ours("fast-scan-small", "fast-scan-small", SMALL),
    Ours("fast-scan-small-ram", "fast-scan-small", SMALL, rows="ram", built="fast-scan-small"),
    Usearch(),
    Lance("lancedb-pq", "IVF_PQ", {"num_sub_vectors": 64}),
    Lance("lancedb-rq", "IVF_RQ", {"num_bits": 5}),
    Paper("paper-long-lists", codes_per_cell=PAPER_CODES_PER_CELL, probes=(20,)),
    Ours("fast-scan-long-lists", "fast-scan", (SAME_PROBES,), codes_per_cell=PAPER_CODES_PER_CELL),
)
SYSTEMS = {system.name: system for system in _ALL}
SERVED = "fast-scan"
"""The system that the scenarios are tried on."""


def served() -> Ours:
    """That system."""
    system = SYSTEMS[SERVED]
    assert isinstance(system, Ours)
    return system
