"""Attacks of a hostile client or guest on its own device, each of which goes on until it is killed."""

import contextlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.client import NOTIFY, RAM_SIZE, BlockingClient, posted_write
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_UNMAP,
    WRITE_MULTI_ENTRY,
    WRITE_MULTI_REPLY,
    Command,
    PciRegion,
)
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DescFlags

_NEXT, _WRITE, _INDIRECT, _AVAIL, _USED = (int(flag) for flag in DescFlags)
_BAR = PciRegion.BAR4
_PAGE = 4096
# In the client's RAM, of 16 MiB: rings of up to 32768 entries, and indirect tables.
_DESC, _DRIVER, _DEVICE, _TABLE, _DATA = 0, 0x10_0000, 0x20_0000, 0x30_0000, 0x80_0000
_NEAR, _FAR = 1 << 32, 1 << 40
_INDIRECT_DESC = 1 << 28
_PACKED = 1 << 34
_NEEDS_RESET = 64
_BURST = 64
_MOST_WRITES = 43_000  # 1 MiB

Ready = Callable[[], None]
"""To be called when the attack has begun."""


@dataclass(frozen=True, slots=True)
class Attack:
    """Attack, and the device that it is for."""

    device: str
    """``{disk}`` is a file of 64 MiB."""
    run: Callable[[str, Ready], None]
    options: Sequence[str] = ()
    """Of `serve`."""
    evicts: bool = False
    """The disk's file is dropped from the page cache all the time."""


class _Attacker(BlockingClient):
    """A client with one queue, laid out by hand."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.view = self.ram.view

    def put(self, address: int, fmt: str, *values: int) -> None:
        struct.pack_into("<" + fmt, self.view, address, *values)

    def map_pages(self, base: int, count: int) -> None:
        """Single pages, of files' places that are no neighbours."""
        for page in range(count):
            self.map(base + page * _PAGE, page * 7919 % (RAM_SIZE // _PAGE) * _PAGE, _PAGE)

    def unmap(self, base: int, size: int) -> None:
        fields = {"argsz": DMA_UNMAP.sizeof(), "flags": 0, "address": base, "size": size}
        self.call(Command.DMA_UNMAP, DMA_UNMAP.build(fields))

    def bring_up(self, *, packed: bool = False) -> None:
        """From a reset to DRIVER_OK, with the first queue as large as it can be."""
        self.view[_DESC:_TABLE] = bytes(_TABLE - _DESC)
        self.negotiate(_INDIRECT_DESC | (_PACKED if packed else 0))
        self.enable_queue(0, None, _DESC, _DRIVER, _DEVICE)
        self.set("device_status", 15)

    def kick(self) -> None:
        self.write(_BAR, NOTIFY, bytes(2))


def _notify_flood(path: str, ready: Ready) -> None:
    with _Attacker(path) as client:
        client.bring_up()
        notifications = posted_write(_BAR, NOTIFY, bytes(2)) * 1000
        ready()
        while True:
            client.socket.sendall(notifications)


def _writes_in_one_message(path: str, ready: Ready) -> None:
    """REGION_WRITE_MULTI, each with as many notifications as fit into a message."""
    with _Attacker(path) as client:
        client.bring_up()
        entry = codec(WRITE_MULTI_ENTRY).pack(NOTIFY, _BAR, 2, bytes(8))
        body = codec(WRITE_MULTI_REPLY).pack(_MOST_WRITES) + entry * _MOST_WRITES
        ready()
        while True:
            client.call(Command.REGION_WRITE_MULTI, body)


def _large_reads(path: str, ready: Ready) -> None:
    """128 reads of 1 MiB at a time, in indirect tables."""
    depth, size = 128, 1 << 20
    with _Attacker(path) as client:
        client.bring_up()
        for number in range(depth):
            table, header = _TABLE + 64 * number, _TABLE + 0x1_0000 + 32 * number
            client.put(header, "IIQ", 0, 0, number % 32 * (size // 512))
            client.put(table, "QIHH", header, 16, _NEXT, 1)
            client.put(table + 16, "QIHH", _DATA + number % 7 * size, size, _NEXT | _WRITE, 2)
            client.put(table + 32, "QIHH", header + 16, 1, _WRITE, 0)
            client.put(_DESC + 16 * number, "QIHH", table, 48, _INDIRECT, 0)
        ready()
        _offer_for_ever(client, list(range(depth)), client.bring_up)


def _offer_for_ever(client: _Attacker, heads: list[int], again: Callable[[], object]) -> None:
    """Make these split chains available whenever all have come back; bring a broken device up again."""
    size = client.read(_BAR, *COMMON_CFG_OFFSETS["queue_size"])
    offered = 0
    while True:
        for number, head in enumerate(heads, start=offered):
            client.put(_DRIVER + 4 + 2 * (number % size), "H", head)
        offered += len(heads)
        client.put(_DRIVER + 2, "H", offered & 0xFFFF)
        client.kick()
        while struct.unpack_from("<H", client.view, _DEVICE + 2)[0] != offered & 0xFFFF:
            if client.status() & _NEEDS_RESET:
                again()
                offered = 0
                break


def _chains(
    path: str,
    ready: Ready,
    *,
    packed: bool = False,
    table: int = 0,
    length: int | None = None,
    regions: int = 0,
    base: int = _NEAR,
) -> None:
    """As many chains as fit, as long as they may be: heads share a tail, or a table of ``table`` entries.

    With ``regions`` each buffer lies in so many pages that were mapped one by one.
    """
    with _Attacker(path) as client:
        client.map_pages(base, regions)
        address, each = (base, regions * _PAGE) if regions else (_DATA, 8)

        def lay() -> list[int]:
            """Bring the device up, and put the descriptors into their places; the heads of a split ring."""
            client.bring_up(packed=packed)
            size = client.read(_BAR, *COMMON_CFG_OFFSETS["queue_size"])
            if packed:
                return _lay_packed(client, size, address, each, table)
            if table:
                _lay_table(client, table, address, each, linked=True)
                for head in range(min(size, _BURST)):
                    client.put(_DESC + 16 * head, "QIHH", _TABLE, 16 * table, _INDIRECT, 0)
                return list(range(min(size, _BURST)))
            tail = min(length or size, size) - 1
            heads = min(size - tail, _BURST) if length else 1 if size < 2 * _BURST else _BURST
            first = size - tail
            for index in range(first, size):
                more = index + 1 < size
                client.put(_DESC + 16 * index, "QIHH", address, each, _WRITE | _NEXT * more, index + 1 if more else 0)
            for head in range(heads):
                client.put(_DESC + 16 * head, "QIHH", address, each, _WRITE | _NEXT, max(first, heads))
            return list(range(heads))

        heads = lay()
        ready()
        if packed:
            while True:
                client.kick()
                while not struct.unpack_from("<H", client.view, _DESC + 14)[0] & _USED:
                    if client.status() & _NEEDS_RESET:
                        break
                lay()
        _offer_for_ever(client, heads, lay)


def _lay_table(client: _Attacker, entries: int, address: int, each: int, *, linked: bool) -> None:
    for index in range(entries):
        more = linked and index + 1 < entries
        flags = (_WRITE | _NEXT * more, index + 1 if more else 0) if linked else (0, _WRITE)
        client.put(_TABLE + 16 * index, "QIHH", address, each, *flags)


def _lay_packed(client: _Attacker, size: int, address: int, each: int, table: int) -> list[int]:
    if table:
        _lay_table(client, table, address, each, linked=False)
    for slot in range(size - 1):
        if table:
            client.put(_DESC + 16 * slot, "QIHH", _TABLE, 16 * table, slot, _INDIRECT | _AVAIL)
        else:
            link = _NEXT if slot < size - 2 else 0
            client.put(_DESC + 16 * slot, "QIHH", address, each, 0, _WRITE | _AVAIL | link)
    return []


def _malformed(path: str, ready: Ready) -> None:
    with _Attacker(path) as client:
        client.bring_up()
        ready()
        while True:
            client.put(_DESC, "QIHH", 1 << 50, 4096, _WRITE, 0)
            client.put(_DRIVER + 2, "HH", 1, 0)
            client.kick()
            client.bring_up()


def _log_flood(path: str, ready: Ready) -> None:
    """Features that cannot be accepted, over and over."""
    offset, size = COMMON_CFG_OFFSETS["device_status"]
    with _Attacker(path) as client:
        ready()
        while True:
            for _ in range(100):
                for status in (0, 1, 3, 11):
                    client.post(_BAR, offset, status.to_bytes(size, "little"))
            client.status()


def _many_maps(path: str, ready: Ready) -> None:
    """As many pages as the server takes, mapped one by one, then all unmapped."""
    with _Attacker(path) as client:
        ready()
        while True:
            with contextlib.suppress(OSError):  # that was all
                client.map_pages(_NEAR, 30_000)
            client.unmap(_NEAR, 30_000 * _PAGE)


def _churn(path: str, ready: Ready) -> None:
    with _Attacker(path) as client:
        client.map_pages(_NEAR, 2000)
        client.bring_up()
        ready()
        while True:
            client.map_pages(_FAR, 8)
            client.unmap(_FAR, 8 * _PAGE)


ATTACKS: Mapping[str, Attack] = {
    "notifications": Attack("rng", _notify_flood),
    "writes in one message": Attack("rng", _writes_in_one_message, ("--write-multiple",)),
    "128 reads of 1 MiB": Attack("blk,size=64M", _large_reads),
    "128 reads of 1 MiB, file": Attack("blk,path={disk}", _large_reads),
    "128 reads of 1 MiB, cold file": Attack("blk,path={disk}", _large_reads, evicts=True),
    "malformed chains, resets": Attack("rng", _malformed),
    "longest chains": Attack("rng", partial(_chains, length=32)),
    "longest chains, tables": Attack("rng", partial(_chains, table=1024)),
    "longest chains of 1024": Attack("rng,queue-size=1024", partial(_chains, length=1000)),
    "longest chains of 32768": Attack("rng,queue-size=32768", _chains),
    "longest chains, packed": Attack("rng,queue-size=1024,packed=on", partial(_chains, packed=True)),
    "longest chains, packed, tables": Attack(
        "rng,queue-size=32768,packed=on", partial(_chains, packed=True, table=1024)
    ),
    "3000 regions in the window": Attack("rng", partial(_chains, length=50, regions=3000)),
    "3000 regions beyond it": Attack("rng", partial(_chains, length=50, regions=3000, base=_FAR)),
    "20000 regions in the window": Attack("rng", partial(_chains, length=50, regions=20_000)),
    "20000 regions beyond it": Attack("rng", partial(_chains, length=50, regions=20_000, base=_FAR)),
    "log lines": Attack("rng", _log_flood),
    "30000 maps and an unmap": Attack("rng", _many_maps),
    "maps and unmaps": Attack("rng", _churn),
}
