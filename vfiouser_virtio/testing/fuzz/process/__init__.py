"""Fuzzer of a server process, over its sockets: what an attack costs those who have nothing to do with it.

::

    seed, number ─▶ family ─▶ ProcessCase: devices, surroundings, steps, as JSON
                                   │
    serve (any tree) ◀── sockets ──┤ lanes: attackers' processes      scenery: files that hang, links, full disks
        │     │  └───── stderr ────┤
        │     └─ /proc/PID ───────▶│ oracle: stalls, deaths, canaries, growth, floods, ends ─▶ ProcessFinding
        └──────── socket ──────────┘ neighbour: an honest client, with canaries; visits: those that come afterwards

The in-process fuzzer looks at replies and crashes. This one looks at time, limits, flags that both ends share, and two
clients at once. A case that has found something is made smaller (`minimizing`).
"""

from vfiouser_virtio.testing.fuzz.process.bench import run_process_case
from vfiouser_virtio.testing.fuzz.process.case import ProcessCase
from vfiouser_virtio.testing.fuzz.process.families import FAMILIES
from vfiouser_virtio.testing.fuzz.process.oracle import ProcessFinding, ServerBudgets
from vfiouser_virtio.testing.fuzz.process.run import (
    ANY,
    fuzz_processes,
    generate_process_case,
    replay_process_case,
)

__all__ = [
    "ANY", "FAMILIES", "ProcessCase", "ProcessFinding", "ServerBudgets", "fuzz_processes", "generate_process_case",
    "replay_process_case", "run_process_case",
]  # fmt: skip
