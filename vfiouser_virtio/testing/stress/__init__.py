"""Stress test of the rings: the driver's virtqueue in one process, the device's in another, over one memfd.

::

    driver process                       memfd                    device process
    guest.SplitVirtqueue    add_buf ──▶  rings, buffers  ◀── pop  vring.SplitRing
    or PackedVirtqueue      get_buf ◀──                  ◀── push or PackedRing (or a whole virtio.Queue in trio)
        kick ───────────────── eventfd ─────────────────────▶
        ◀───────────────────── eventfd ───────────────────── interrupt

Each side goes to sleep when the ring says that it may, and only an eventfd wakes it: a wake-up that is lost is two
processes asleep for good, which the referee sees. Every buffer has a number and a checksum in both directions.
`sabotage` proves that this finds what it is there to find. ``scripts/stress --help`` has examples.
"""

from vfiouser_virtio.testing.stress.game import Failure, Game, GameResult
from vfiouser_virtio.testing.stress.referee import play
from vfiouser_virtio.testing.stress.sabotage import SABOTAGE

__all__ = ["SABOTAGE", "Failure", "Game", "GameResult", "play"]
