"""Benchmarks: a module each; `scripts/bench` runs them. How to read the figures: docs/performance.md."""
