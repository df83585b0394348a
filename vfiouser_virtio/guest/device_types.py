"""What drivers and tools know of each device type (virtio 1.4, 5): its configuration, features and queues by name."""

from dataclasses import dataclass
from enum import IntEnum

from vfiouser_virtio.protocols.codec import Schema
from vfiouser_virtio.protocols.virtio import blk, console
from vfiouser_virtio.protocols.virtio.ids import DeviceId


@dataclass(frozen=True, slots=True)
class DeviceType:
    """Queues 0, 1, … have the names of ``queues``; then come those of ``more``, over and over, numbered.

    The number goes on from ``first``: the specification counts requestq1 … requestqN, but port0 … portN.
    """

    name: str
    config: "Schema | None" = None
    features: type[IntEnum] | None = None
    queues: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    first: int = 1

    def queue_name(self, index: int) -> str:
        """What the specification calls a queue; ``queue 7`` where it does not."""
        if index < len(self.queues):
            return self.queues[index]
        if not self.more:
            return f"queue {index}"
        number, position = divmod(index - len(self.queues), len(self.more))
        return f"{self.more[position]}{number + self.first}"

    def queue_index(self, name: str) -> int:
        """The other way round. Raises LookupError for a name that no queue of this type has."""
        if name in self.queues:
            return self.queues.index(name)
        stem = name.rstrip("0123456789")
        number = name[len(stem) :]
        if stem in self.more and number and int(number) >= self.first:
            return len(self.queues) + (int(number) - self.first) * len(self.more) + self.more.index(stem)
        known = [*self.queues, *(f"{stem}{self.first}…" for stem in self.more)]
        raise LookupError(f"{self.name}: no queue {name!r} among {', '.join(known) or 'none'}")


DEVICE_TYPES: dict[int, DeviceType] = {
    DeviceId.BLOCK: DeviceType("blk", blk.CONFIG, blk.Feature, more=("requestq",)),
    DeviceId.CONSOLE: DeviceType(
        "console",
        console.CONFIG,
        console.Feature,
        queues=("receiveq0", "transmitq0", "control_receiveq", "control_transmitq"),
        more=("receiveq", "transmitq"),
    ),
    DeviceId.RNG: DeviceType("rng", queues=("requestq",)),
}
"""By virtio device id."""


def device_type(virtio_id: int) -> DeviceType:
    """What is known of a type; for an unknown one just its number."""
    known = DEVICE_TYPES.get(virtio_id)
    if known is not None:
        return known
    return DeviceType(DeviceId(virtio_id).name.lower() if virtio_id in {*DeviceId} else f"type {virtio_id}")
