"""Benchmarks: each module has `run() -> Report`, and is run by `scripts/bench NAME`."""
