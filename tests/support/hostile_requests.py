"""Requests that attacks on devices are made of."""

from collections.abc import Sequence
from pathlib import Path

from support.hostile import Attack

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.virtio import blk, net
from vfiouser_virtio.protocols.virtio.blk import RequestType
from vfiouser_virtio.testing.fuzz import TARGETS, FuzzTarget

SECTORS = 2048
"""Of the disks that are attacked."""
RX, TX, CONTROL = 0, 1, 4
"""Queues of the network device that is attacked."""
FRAME = b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + b"\x88\xb5" + bytes(50)


def blk_header(kind: int, sector: int = 0, ioprio: int = 0) -> bytes:
    return blk.REQUEST_HEADER_CODEC.pack(kind, ioprio, sector)


def blk_segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return blk.SEGMENT_CODEC.pack(sector, sectors, flags)


READ = RequestType.IN.value
WRITE_OUT = RequestType.OUT.value


def disk_in(path: Path, size: int = SECTORS * 512) -> FuzzTarget:
    """A disk of a file, made anew each time."""
    path.write_bytes(bytes(size))
    return again_in(path)


def again_in(path: Path) -> FuzzTarget:
    """A disk of a file as it is."""
    return FuzzTarget(lambda: Blk(path=path), TARGETS["blk"].works, blk.TYPE)


def net_header(features: int, **fields: int) -> bytes:
    """Header of a packet, in the length that goes with the features; all but ``fields`` is zero."""
    codec = net.hdr_codec(features)
    names = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset", "num_buffers")
    values = [fields.get(name, 0) for name in names]
    return codec.pack(*values, *(0,) * (len(codec.unpack(bytes(codec.size))) - len(values)))


def one_byte_each(data: bytes) -> Sequence[bytes]:
    """The same in as many buffers."""
    return [data[at : at + 1] for at in range(len(data))]


async def request(
    attack: Attack, readable: Sequence[bytes], writable: Sequence[int], queue: int = 0
) -> tuple[int, list[bytes]] | None:
    """Used length, and what is in the writable buffers; None where the device needs a reset."""
    offered = attack.driver.offer(queue, readable, writable)
    assert offered
    head, addresses = offered
    await attack.kick(queue)
    used = await attack.driver.wait_used(attack.driver.rings[queue], head)
    if used is None:
        return None
    return used, [attack.ram.read(address, size) for address, size in zip(addresses, writable, strict=True)]


async def status_of(attack: Attack, readable: Sequence[bytes], writable: Sequence[int]) -> int:
    """Status byte of a block request."""
    done = await request(attack, readable, writable)
    assert done is not None
    return done[1][-1][-1]
