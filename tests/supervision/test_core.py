"""Device core with a journal: what it saves."""

import os

from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.supervision.core import SupervisedCore
from vfiouser_virtio.supervision.journal import make_journal
from vfiouser_virtio.virtio import Stop


class Deaf:
    """A driver that no interrupt reaches."""

    def queue_interrupt(self, index: int) -> None: ...
    def config_interrupt(self) -> None: ...


def test_a_driver_that_takes_over_is_saved_with_its_first_notification() -> None:
    """Else the device would be of a client that has left, and need a reset after a death."""
    journal = make_journal()
    core = SupervisedCore(Rng(), GuestMemory(), Deaf(), journal_fd=journal)
    saved = []
    core.on_change = lambda: saved.append(core.state()["another"])
    core.stop(Stop.UNTIL_KICK)
    assert core.state()["another"]
    for _ in range(2):
        core.queues[0].kick()
    assert saved == [False]
    os.close(journal)
