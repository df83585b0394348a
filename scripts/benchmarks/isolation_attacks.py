"""Attacks of a hostile client or guest on its own device, each of which goes on until it is killed."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import WRITE_MULTI_ENTRY, WRITE_MULTI_REPLY, Command, PciRegion
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.testing.raw.blocking import NOTIFY, BlockingClient, posted_write
from vfiouser_virtio.testing.raw.long_chains import (
    DATA,
    DESC,
    DRIVER,
    FAR,
    NEAR,
    PAGE,
    TABLE,
    LongChains,
    bring_up,
    map_pages,
    offer_split,
    put,
)

_NEXT, _WRITE, _INDIRECT = (int(flag) for flag in (DescFlags.NEXT, DescFlags.WRITE, DescFlags.INDIRECT))
_BAR = PciRegion.BAR4
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


def _notify_flood(path: str, ready: Ready) -> None:
    with BlockingClient(path) as client:
        bring_up(client)
        notifications = posted_write(_BAR, NOTIFY, bytes(2)) * 1000
        ready()
        while True:
            client.socket.sendall(notifications)


def _writes_in_one_message(path: str, ready: Ready) -> None:
    """REGION_WRITE_MULTI, each with as many notifications as fit into a message."""
    with BlockingClient(path) as client:
        bring_up(client)
        entry = codec(WRITE_MULTI_ENTRY).pack(NOTIFY, _BAR, 2, bytes(8))
        body = codec(WRITE_MULTI_REPLY).pack(_MOST_WRITES) + entry * _MOST_WRITES
        ready()
        while True:
            client.call(Command.REGION_WRITE_MULTI, body)


def _large_reads(path: str, ready: Ready) -> None:
    """128 reads of 1 MiB at a time, in indirect tables."""
    depth, size = 128, 1 << 20
    with BlockingClient(path) as client:
        bring_up(client)
        for number in range(depth):
            table, header = TABLE + 64 * number, TABLE + 0x1_0000 + 32 * number
            put(client, header, "IIQ", 0, 0, number % 32 * (size // 512))
            put(client, table, "QIHH", header, 16, _NEXT, 1)
            put(client, table + 16, "QIHH", DATA + number % 7 * size, size, _NEXT | _WRITE, 2)
            put(client, table + 32, "QIHH", header + 16, 1, _WRITE, 0)
            put(client, DESC + 16 * number, "QIHH", table, 48, _INDIRECT, 0)
        ready()
        offer_split(client, list(range(depth)), lambda: bring_up(client), _for_ever)


def _chains(path: str, ready: Ready, *, chains: LongChains) -> None:
    """As many chains as fit, as long as they may be."""
    with BlockingClient(path) as client:
        map_pages(client, chains.base, chains.regions)
        heads = chains.lay(client)
        ready()
        chains.offer_for_ever(client, heads, _for_ever)


def _for_ever() -> bool:
    return True


def _malformed(path: str, ready: Ready) -> None:
    with BlockingClient(path) as client:
        bring_up(client)
        ready()
        while True:
            put(client, DESC, "QIHH", 1 << 50, 4096, _WRITE, 0)
            put(client, DRIVER + 2, "HH", 1, 0)
            client.kick()
            bring_up(client)


def _log_flood(path: str, ready: Ready) -> None:
    """Features that cannot be accepted, over and over."""
    offset, size = COMMON_CFG_OFFSETS["device_status"]
    with BlockingClient(path) as client:
        ready()
        while True:
            for _ in range(100):
                for status in (0, 1, 3, 11):
                    client.post(_BAR, offset, status.to_bytes(size, "little"))
            client.status()


def _many_maps(path: str, ready: Ready) -> None:
    """As many pages as the server takes, mapped one by one, then all unmapped."""
    with BlockingClient(path) as client:
        ready()
        while True:
            with contextlib.suppress(OSError):  # that was all
                map_pages(client, NEAR, 30_000)
            client.unmap(NEAR, 30_000 * PAGE)


def _churn(path: str, ready: Ready) -> None:
    with BlockingClient(path) as client:
        map_pages(client, NEAR, 2000)
        bring_up(client)
        ready()
        while True:
            map_pages(client, FAR, 8)
            client.unmap(FAR, 8 * PAGE)


ATTACKS: Mapping[str, Attack] = {
    "notifications": Attack("rng", _notify_flood),
    "writes in one message": Attack("rng", _writes_in_one_message, ("--write-multiple",)),
    "128 reads of 1 MiB": Attack("blk,size=64M", _large_reads),
    "128 reads of 1 MiB, file": Attack("blk,path={disk}", _large_reads),
    "128 reads of 1 MiB, cold file": Attack("blk,path={disk}", _large_reads, evicts=True),
    "malformed chains, resets": Attack("rng", _malformed),
    "longest chains": Attack("rng", partial(_chains, chains=LongChains(length=32))),
    "longest chains, tables": Attack("rng", partial(_chains, chains=LongChains(table=1024))),
    "longest chains of 1024": Attack("rng,queue-size=1024", partial(_chains, chains=LongChains(length=1000))),
    "longest chains of 32768": Attack("rng,queue-size=32768", partial(_chains, chains=LongChains())),
    "longest chains, packed": Attack("rng,queue-size=1024,packed=on", partial(_chains, chains=LongChains(packed=True))),
    "longest chains, packed, tables": Attack(
        "rng,queue-size=32768,packed=on", partial(_chains, chains=LongChains(packed=True, table=1024))
    ),
    "3000 regions in the window": Attack("rng", partial(_chains, chains=LongChains(length=50, regions=3000))),
    "3000 regions beyond it": Attack("rng", partial(_chains, chains=LongChains(length=50, regions=3000, base=FAR))),
    "20000 regions in the window": Attack("rng", partial(_chains, chains=LongChains(length=50, regions=20_000))),
    "20000 regions beyond it": Attack("rng", partial(_chains, chains=LongChains(length=50, regions=20_000, base=FAR))),
    "log lines": Attack("rng", _log_flood),
    "30000 maps and an unmap": Attack("rng", _many_maps),
    "maps and unmaps": Attack("rng", _churn),
}
