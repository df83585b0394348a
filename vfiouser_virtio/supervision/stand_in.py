"""Stand-in for a device that dies again and again: it has its registers, asks for a reset, and serves no request.

So its driver gets a defined answer, and QEMU, which aborts the VM at the next reset when a server is gone, has one.
"""

import json

import construct as c

from vfiouser_virtio.protocols.record import Record
from vfiouser_virtio.supervision.journal import Journal
from vfiouser_virtio.virtio import Device


class StandIn(Device):
    """Device that no driver can use: it refuses all features."""

    def __init__(self, *, features: int, config: bytes, sizes: list[int]) -> None:
        record = Record(c.Struct("all" / c.Bytes(len(config))), all=config) if config else None
        super().__init__(config=record, features=features)
        for size in sizes:
            self.add_queue().resize(size)

    def features_ok(self) -> bool:
        """No."""
        return False


def stand_in(journal_fd: int) -> Device | None:
    """The one for the device that has written this journal; None where it has written nothing that can be read."""
    try:
        state = json.loads(Journal(journal_fd, []).load() or b"")
        known = state["device"]
        kind = type("StandIn", (StandIn,), {"device_id": int(known["id"])})
        config, sizes = bytes.fromhex(known["config"]), state["core"]["sizes"]
        made: Device = kind(features=int(known["features"]), config=config, sizes=sizes)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return made
