"""Good client of a server under test, and what it is shown: regions and interrupts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    IRQ_INFO,
    REGION_ACCESS_CODEC,
    REGION_INFO,
    Command,
    MessageFlags,
    PciRegion,
)
from vfiouser_virtio.testing.fuzz.client import hello
from vfiouser_virtio.testing.fuzz.message_step import payload
from vfiouser_virtio.testing.fuzz.servers.connection import ServerConnection
from vfiouser_virtio.testing.fuzz.servers.virtio_talk import CONFIG_SIZE, ShownVirtio
from vfiouser_virtio.testing.raw.client import RawMessage

_MOST = 16
"""Regions and interrupts that are looked at."""
_ARGSZ = 4096


@dataclass(frozen=True, slots=True)
class ShownDevice:
    """Regions (index to size) and interrupts (index to count) of a device."""

    regions: Mapping[int, int] = field(default_factory=lambda: {0: 0x1000, 7: 0x1000})
    irqs: Mapping[int, int] = field(default_factory=lambda: {0: 1})
    virtio: ShownVirtio | None = None

    def __str__(self) -> str:
        regions = ", ".join(f"{index}: {size:#x} bytes" for index, size in self.regions.items())
        irqs = ", ".join(f"{index}: {count}" for index, count in self.irqs.items())
        kind = f"; virtio device type {self.virtio.device_id}" if self.virtio is not None else ""
        return f"regions {regions or 'none'}; interrupts {irqs or 'none'}{kind}"


async def greet(connection: ServerConnection) -> bool:
    """VERSION, and DEVICE_GET_INFO: whether both were answered well. Raises Found."""
    for command, body in (
        (Command.VERSION, hello()),
        (Command.DEVICE_GET_INFO, payload(Command.DEVICE_GET_INFO, fields={"argsz": DEVICE_INFO.sizeof()})),
    ):
        reply = await connection.call(command, body)
        if reply is None or reply.flags & MessageFlags.ERROR:
            return False
    return True


async def look(connection: ServerConnection) -> ShownDevice | None:
    """What there is; None where the server does not answer VERSION as it should. Raises Found."""
    reply = await connection.call(Command.VERSION, hello())
    if reply is None or reply.flags & MessageFlags.ERROR:
        return None
    info = await _ask(connection, Command.DEVICE_GET_INFO, argsz=DEVICE_INFO.sizeof())
    if info is None:
        return ShownDevice()
    counts = DEVICE_INFO.parse(info.body)
    regions: dict[int, int] = {}
    for index in range(min(counts.num_regions, _MOST)):
        reply = await _ask(connection, Command.DEVICE_GET_REGION_INFO, argsz=_ARGSZ, index=index)
        if reply is not None and (size := REGION_INFO.parse(reply.body).size):
            regions[index] = size
    irqs: dict[int, int] = {}
    for index in range(min(counts.num_irqs, _MOST)):
        reply = await _ask(connection, Command.DEVICE_GET_IRQ_INFO, argsz=IRQ_INFO.sizeof(), index=index)
        if reply is not None and (count := IRQ_INFO.parse(reply.body).count):
            irqs[index] = count
    return ShownDevice(regions, irqs, await _virtio(connection))


async def _virtio(connection: ServerConnection) -> ShownVirtio | None:
    reply = await _ask(connection, Command.REGION_READ, region=PciRegion.CONFIG, count=CONFIG_SIZE)
    return None if reply is None else ShownVirtio.of(reply.body[REGION_ACCESS_CODEC.size :])


async def _ask(connection: ServerConnection, command: Command, **fields: int) -> RawMessage | None:
    reply = await connection.call(command, payload(command, fields=fields))
    return None if reply is None or reply.flags & MessageFlags.ERROR else reply
