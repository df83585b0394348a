"""Hostile steps of a client: each function is one kind of step, its parameters are the keys of the step."""

import contextlib
import itertools
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.testing.fuzz.process import flag_races
from vfiouser_virtio.testing.fuzz.process.lane import ATTACKERS, TIMEOUT, Lane
from vfiouser_virtio.testing.fuzz.process.memories import HostileMemory, MemoryKind
from vfiouser_virtio.testing.raw.blocking import CAPABILITIES, NOTIFY, BlockingClient, posted_write
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK
from vfiouser_virtio.testing.raw.long_chains import (
    DATA,
    DESC,
    DEVICE,
    DRIVER,
    PAGE,
    TABLE,
    LongChains,
    bring_up,
    map_pages,
    put,
)
from vfiouser_virtio.transports.pci import VIRTIO_BAR

_BATCH = 200


def connect(
    lane: Lane, client: int, device: int, memory: MemoryKind = "sealed", capabilities: str = CAPABILITIES
) -> None:
    """A client comes to a device, with memory of its own."""
    name = f"{lane.number}-{len(lane.memories)}"
    lane.memories[name] = ram = HostileMemory(memory, name, lane.folder / ATTACKERS)
    lane.clients[client] = BlockingClient(lane.sockets[device], memory=ram, timeout=TIMEOUT, capabilities=capabilities)


def leave(lane: Lane, client: int, how: str = "close") -> None:
    """A client leaves: at once, in the middle of a message, or after it has unmapped its RAM."""
    one = lane.clients.pop(client)
    with contextlib.suppress(OSError):
        match how:
            case "half":
                one.socket.sendall(posted_write(VIRTIO_BAR, NOTIFY, bytes(2))[:21])
            case "unmap":
                one.unmap(0, one.ram.size)
            case "busy":
                one.socket.sendall(posted_write(VIRTIO_BAR, NOTIFY, bytes(2)) * _BATCH)
    one.socket.close()


def pages(lane: Lane, client: int, base: int, count: int, step: int = 1) -> None:
    """Pages are mapped one by one, as many as the server takes."""
    one = lane.clients[client]
    for first in range(0, count, 500):
        if not lane.goes_on():
            return
        map_pages(one, base + first * step * PAGE, min(500, count - first), step=step)


def unmap(lane: Lane, client: int, base: int, size: int) -> None:
    lane.clients[client].unmap(base, size)


def protect(lane: Lane, client: int) -> None:
    """All of the RAM is mapped again, read-only."""
    one = lane.clients[client]
    one.unmap(0, one.ram.size)
    one.map(0, 0, one.ram.size, flags=1)


def start(lane: Lane, client: int, size: int | None = None, packed: bool = False) -> None:
    """The device is brought up, with its first queue."""
    bring_up(lane.clients[client], size=size, packed=packed)


def request(
    lane: Lane, client: int, count: int = 1, length: int = 64, header: int | None = None, kicks: int = 1
) -> None:
    """Well-formed chains, one buffer each, and kicks; with the header and status of a disk's request of a type."""
    one = lane.clients[client]
    flags = int(DescFlags.WRITE)
    heads = []
    for number in range(count):
        at = DATA + number * 2 * max(length, PAGE) % (one.ram.size - DATA - 2 * max(length, PAGE))
        if header is not None:
            head, flag = 3 * number, int(DescFlags.NEXT)
            put(one, TABLE + 32 * number, "IIQ", header, 0, 8 * number)
            put(one, DESC + 16 * head, "QIHH", TABLE + 32 * number, 16, flag, head + 1)
            put(one, DESC + 16 * (head + 1), "QIHH", at, length, flag if header else flags | flag, head + 2)
            put(one, DESC + 16 * (head + 2), "QIHH", TABLE + 32 * number + 16, 1, flags, 0)
        else:
            head = number
            put(one, DESC + 16 * head, "QIHH", at, length, flags, 0)
        heads.append(head)
    for number, head in enumerate(heads):
        put(one, DRIVER + 4 + 2 * number, "H", head)
    put(one, DRIVER + 2, "H", len(heads))
    for _ in range(kicks):
        one.post(VIRTIO_BAR, NOTIFY, bytes(2))


def long_chains(lane: Lane, client: int, seconds: float, **chains: Any) -> None:
    """`LongChains`, for so long."""
    layout = LongChains(**chains)
    one = lane.clients[client]
    goes_on = lane.during(seconds)
    map_pages(one, layout.base, layout.regions)
    heads = layout.lay(one)
    layout.offer_for_ever(one, heads, goes_on)


def malformed(lane: Lane, client: int, seconds: float, descriptor: Sequence[int]) -> None:
    """A descriptor that makes the device need a reset, which it gets, for so long."""
    one = lane.clients[client]
    goes_on = lane.during(seconds)
    while goes_on():
        put(one, DESC, "QIHH", *descriptor)
        put(one, DRIVER + 2, "HH", 1, 0)
        one.kick()
        bring_up(one)


def flood(lane: Lane, client: int, seconds: float, writes: Sequence[Sequence[Any]], ask: bool = True) -> None:
    """Posted writes to fields of the common configuration, (name, value) each, over and over.

    With ``ask`` a register is read after each hundred, so that the server is not merely behind.
    """
    one = lane.clients[client]
    message = b""
    for name, value in writes:
        offset, size = COMMON_CFG_OFFSETS[name]
        message += posted_write(VIRTIO_BAR, offset, int(value).to_bytes(size, "little"))
    goes_on = lane.during(seconds)
    while goes_on():
        one.socket.sendall(message * 100)
        if ask:
            one.status()


def notify_flood(lane: Lane, client: int, seconds: float, queue: int = 0) -> None:
    one = lane.clients[client]
    messages = posted_write(VIRTIO_BAR, NOTIFY + 4 * queue, queue.to_bytes(2, "little")) * 1000
    goes_on = lane.during(seconds)
    while goes_on():
        one.socket.sendall(messages)


def strangers(lane: Lane, device: int, seconds: float, capabilities: str = CAPABILITIES) -> None:
    """Clients come, while another one is served or not, and go."""
    goes_on = lane.during(seconds)
    while goes_on():
        with contextlib.suppress(OSError):
            BlockingClient(
                lane.sockets[device],
                memory=SharedMemory(PAGE, address=0),
                timeout=TIMEOUT,
                capabilities=capabilities,
            ).close()


def visits(lane: Lane, device: int, count: int, how: str = "close") -> None:
    """A client comes, starts the device and leaves, so many times."""
    for number in range(count):
        if not lane.goes_on():
            return
        connect(lane, -1, device)
        start(lane, -1)
        request(lane, -1)
        leave(lane, -1, how)
        if number:  # one is enough to look at
            lane.memories.popitem()[1].destroy()


def truncate(lane: Lane, client: int, size: int, kicks: int = 1) -> None:
    """The file of the client's memory becomes shorter under it. Its own mapping is not touched any more."""
    one = lane.clients[client]
    assert one.ram.fd is not None
    os.ftruncate(one.ram.fd, size)
    for _ in range(kicks):
        one.post(VIRTIO_BAR, NOTIFY, bytes(2))


def print_text(lane: Lane, client: int, text: str, repeat: int = 1, seconds: float = 0) -> None:
    """Output of a console's first port, ``repeat`` times the text at once; once, or over and over for so long."""
    one = lane.clients[client]
    one.negotiate()
    one.enable_queue(1, None, DESC, DRIVER, DEVICE)
    one.set("device_status", DRIVER_OK)
    data = text.encode() * repeat
    one.ram.write(DATA, data)
    put(one, DESC, "QIHH", DATA, len(data), 0, 0)
    goes_on = lane.during(seconds)
    for number in itertools.count(1):
        put(one, DRIVER + 2, "HH", number & 0xFFFF, 0)
        one.kick(1)
        while struct.unpack_from("<H", one.ram.view, DEVICE + 2)[0] != number & 0xFFFF:
            one.status()
            if not lane.goes_on():
                return
        if not goes_on():
            return


def pause(lane: Lane, seconds: float) -> None:
    goes_on = lane.during(seconds)
    while goes_on():
        time.sleep(min(0.01, seconds))


STEPS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        connect, leave, pages, unmap, protect, start, request, long_chains, malformed, flood, notify_flood, strangers,
        visits, truncate, print_text, pause, flag_races.irq_race, flag_races.notification_race,
        flag_races.resample_race,
    )
}  # fmt: skip
"""By the name that a step has."""
