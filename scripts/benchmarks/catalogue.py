"""Catalogue of all benchmarks, in the order in which they run."""

from benchmarks import (
    engines,
    first_request,
    guest_io,
    isolation,
    net,
    nvme,
    own_pci,
    processes,
    registers,
    requests,
    rings,
    scaling,
    stall,
    startup,
    steps,
    supervision,
)
from benchmarks.measure import Benchmark

_ALL = (
    startup,
    first_request,
    stall,
    rings,
    steps,
    own_pci,
    registers,
    requests,
    guest_io,
    nvme,
    net,
    scaling,
    processes,
    supervision,
    isolation,
    engines,
)

BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _ALL}
