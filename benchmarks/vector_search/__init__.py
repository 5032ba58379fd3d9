"""Parts of `benchmarks/retrieval.py`: data, systems, measurements, scenarios, targets and the report."""
