"""Fuzzer of the whole stack: hostile vfio-user messages, registers, rings and requests, with an oracle.

::

    seed, index ─▶ messages | registers | rings | requests ─▶ Case: steps, as JSON
                                                               │
    Device ─ VirtioPci ─ Server ◀── UNIX socket ── Client ◀── perform
       └──────── oracle: log, replies, canaries, fds, mappings, tasks ─▶ Finding ─▶ minimize ─▶ corpus/*.json

The oracle in one sentence: any bytes give a reply, a PeerError or NEEDS_RESET, and never another exception, a hang, or
a write outside the offered buffers. ``scripts/fuzz --help`` says how to run it.
"""

from vfiouser_virtio.testing.fuzz.bench import run_case
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.run import fuzz, generate, minimize
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget

__all__ = ["TARGETS", "Case", "Finding", "FuzzTarget", "Step", "fuzz", "generate", "minimize", "run_case"]
