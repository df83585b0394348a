"""Long descriptor chains, laid out by hand for all the work that they make: heads that share a tail, or a table.

::

    0x000000  descriptors     0x100000  available ring     0x200000  used ring
    0x300000  one indirect table                            0x800000  data
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.testing.raw.blocking import BlockingClient
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK

_NEXT, _WRITE, _INDIRECT, _AVAIL, _USED = (int(flag) for flag in DescFlags)
PAGE = 4096
# In the client's RAM, of 16 MiB: rings of up to 32768 entries, and indirect tables.
DESC, DRIVER, DEVICE, TABLE, DATA = 0, 0x10_0000, 0x20_0000, 0x30_0000, 0x80_0000
NEAR, FAR = 1 << 32, 1 << 40
"""Addresses for pages that are mapped one by one: in a server's first window, and beyond it."""
BURST = 64
_INDIRECT_DESC = 1 << 28
_PACKED = 1 << 34


def put(client: BlockingClient, address: int, fmt: str, *values: int) -> None:
    """Store little-endian values to the client's RAM."""
    struct.pack_into("<" + fmt, client.ram.view, address, *values)


def map_pages(client: BlockingClient, base: int, count: int, *, step: int = 1) -> None:
    """Map single pages, each ``step`` pages behind the one before, of scattered places of the RAM's file."""
    pages = client.ram.size // PAGE
    client.map_all(((base + page * step * PAGE, page * 7919 % pages * PAGE) for page in range(count)), PAGE)


def bring_up(client: BlockingClient, *, size: int | None = None, packed: bool = False) -> None:
    """From a reset to DRIVER_OK, with the first queue as large as it can be, or of ``size`` entries."""
    client.ram.view[DESC:TABLE] = bytes(TABLE - DESC)
    client.negotiate(_INDIRECT_DESC | (_PACKED if packed else 0))
    client.enable_queue(0, size, DESC, DRIVER, DEVICE)
    client.set("device_status", DRIVER_OK)


@dataclass(frozen=True, slots=True)
class LongChains:
    """Chains of one queue, as many as fit into a burst, and as long as they may be."""

    packed: bool = False
    table: int = 0
    """Entries of an indirect table that all of them name; 0 for none."""
    length: int | None = None
    """Descriptors of each, most of which they share; as many as the queue has by default."""
    regions: int = 0
    """Pages that were mapped one by one at ``base`` (`map_pages`): each buffer lies in all of them."""
    base: int = NEAR
    size: int | None = None
    """Entries of the queue."""

    def lay(self, client: BlockingClient) -> list[int]:
        """Bring the device up, and put the descriptors into their places; the heads of a split ring."""
        bring_up(client, size=self.size, packed=self.packed)
        address, each = (self.base, self.regions * PAGE) if self.regions else (DATA, 8)
        size = client.get("queue_size")
        if self.packed:
            return self._lay_packed(client, size, address, each)
        if self.table:
            _lay_table(client, self.table, address, each, linked=True)
            for head in range(min(size, BURST)):
                put(client, DESC + 16 * head, "QIHH", TABLE, 16 * self.table, _INDIRECT, 0)
            return list(range(min(size, BURST)))
        tail = min(self.length or size, size) - 1
        heads = min(size - tail, BURST) if self.length else 1 if size < 2 * BURST else BURST
        first = size - tail
        for index in range(first, size):
            more = index + 1 < size
            put(client, DESC + 16 * index, "QIHH", address, each, _WRITE | _NEXT * more, index + 1 if more else 0)
        for head in range(heads):
            put(client, DESC + 16 * head, "QIHH", address, each, _WRITE | _NEXT, max(first, heads))
        return list(range(heads))

    def _lay_packed(self, client: BlockingClient, size: int, address: int, each: int) -> list[int]:
        if self.table:
            _lay_table(client, self.table, address, each, linked=False)
        for slot in range(size - 1):
            if self.table:
                put(client, DESC + 16 * slot, "QIHH", TABLE, 16 * self.table, slot, _INDIRECT | _AVAIL)
            else:
                link = _NEXT if slot < size - 2 else 0
                put(client, DESC + 16 * slot, "QIHH", address, each, 0, _WRITE | _AVAIL | link)
        return []

    def offer_for_ever(self, client: BlockingClient, heads: list[int], goes_on: Callable[[], bool]) -> None:
        """Make them available whenever all have come back, while ``goes_on``; bring a broken device up again."""
        if self.packed:
            self._offer_packed(client, goes_on)
        else:
            offer_split(client, heads, lambda: self.lay(client), goes_on)

    def _offer_packed(self, client: BlockingClient, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            client.kick()
            while not struct.unpack_from("<H", client.ram.view, DESC + 14)[0] & _USED:
                if client.status() & DeviceStatus.NEEDS_RESET or not goes_on():
                    break
            self.lay(client)


def offer_split(
    client: BlockingClient, heads: list[int], again: Callable[[], object], goes_on: Callable[[], bool]
) -> None:
    """`LongChains.offer_for_ever` of any chains in a split ring; ``again`` brings the device up."""
    size = client.get("queue_size")
    offered = 0
    while goes_on():
        for number, head in enumerate(heads, start=offered):
            put(client, DRIVER + 4 + 2 * (number % size), "H", head)
        offered += len(heads)
        put(client, DRIVER + 2, "H", offered & 0xFFFF)
        client.kick()
        while struct.unpack_from("<H", client.ram.view, DEVICE + 2)[0] != offered & 0xFFFF:
            if client.status() & DeviceStatus.NEEDS_RESET or not goes_on():
                again()
                offered = 0
                break


def _lay_table(client: BlockingClient, entries: int, address: int, each: int, *, linked: bool) -> None:
    for index in range(entries):
        more = linked and index + 1 < entries
        flags = (_WRITE | _NEXT * more, index + 1 if more else 0) if linked else (0, _WRITE)
        put(client, TABLE + 16 * index, "QIHH", address, each, *flags)
