"""vfio-user (QEMU docs/interop/vfio-user.rst): device information, and accesses to regions."""

import os

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.pci import CFG_SPACE_EXP_SIZE, CFG_SPACE_SIZE
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    IRQ_INFO,
    REGION_ACCESS_CODEC,
    REGION_INFO,
    REGION_IO_FDS,
    Command,
    DeviceFlags,
    IrqSetFlags,
    MessageFlags,
    PciIrq,
    PciRegion,
)
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, check, wire_check
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, note
from vfiouser_virtio.testing.conformance.wire import BOGUS, FAR, PAGE, Wire, refused
from vfiouser_virtio.vfio_user import QEMU_OPTIONS, RemoteError, SharedMemory

_DEVICE_INFO, _REGION_INFO, _IRQ_INFO = codec(DEVICE_INFO), codec(REGION_INFO), codec(IRQ_INFO)
_REGION_IO_FDS = codec(REGION_IO_FDS)


# ---- what there is -----------------------------------------------------------------------------------------------


@wire_check("vfio-user/device-info", section="VFIO_USER_DEVICE_GET_INFO", observe="the reply, and those to other argsz")
async def device_info(wire: Wire) -> None:
    """It is a PCI device with at least 8 regions and 3 interrupt indexes; a too small argsz is refused."""
    async with wire.connect() as client:
        info = await client.device_info()
        note(bool(info.flags & DeviceFlags.PCI), f"flags {info.flags:#x} lack PCI")
        # QEMU takes 8 to 100 regions and 3 to 50 indexes.
        note(8 <= info.num_regions <= 100, f"{info.num_regions} regions, not 8 to 100 (QEMU)")
        note(3 <= info.num_irqs <= 50, f"{info.num_irqs} interrupt indexes, not 3 to 50 (QEMU)")
        await refused(client, Command.DEVICE_GET_INFO, _DEVICE_INFO.pack(4, 0, 0, 0), "with argsz 4")


@wire_check(
    "vfio-user/argsz",
    section="VFIO_USER_DEVICE_GET_REGION_INFO",
    observe="GET_INFO, GET_REGION_INFO and GET_IRQ_INFO with argsz 0xfe0 and as long a payload, as SPDK sends them",
)
async def argsz(wire: Wire) -> None:
    """A larger argsz, and a longer payload, than the structure are fine; the reply says the argsz that it needs."""
    room = 0xFE0
    requests = (
        (Command.DEVICE_GET_INFO, _DEVICE_INFO.pack(room, 0, 0, 0), _DEVICE_INFO.size),
        (Command.DEVICE_GET_REGION_INFO, _REGION_INFO.pack(room, 0, PciRegion.CONFIG, 0, 0, 0), _REGION_INFO.size),
        (Command.DEVICE_GET_IRQ_INFO, _IRQ_INFO.pack(room, 0, PciIrq.INTX, 0), _IRQ_INFO.size),
    )
    async with wire.connect() as client:
        for command, fixed, size in requests:
            reply = await client.exchange(command, fixed.ljust(room, b"\0"))
            failed = bool(reply.flags & MessageFlags.ERROR)
            expect(not failed, f"{command.name} with argsz {room:#x} fails with errno {reply.error}")
            expect(len(reply.payload) >= size, f"{command.name}: a reply of {len(reply.payload)} bytes")
            needed = int.from_bytes(reply.payload[:4], "little")
            expect(size <= needed <= room, f"{command.name}: the reply's argsz is {needed:#x}")


@wire_check(
    "vfio-user/region-info",
    section="VFIO_USER_DEVICE_GET_REGION_INFO",
    observe="all regions, one that is not there, and an argsz that is too small",
)
async def region_info(wire: Wire) -> None:
    """Config space has 256 or 4096 bytes, a BAR a power of two; an index that is not there is refused."""
    async with wire.connect() as client:
        regions = (await client.device_info()).num_regions
        for index in range(min(regions, 9)):
            size = (await client.region_info(index)).size
            if index == PciRegion.CONFIG:
                note(size in (CFG_SPACE_SIZE, CFG_SPACE_EXP_SIZE), f"config space has {size:#x} bytes")
            elif index < PciRegion.ROM:
                note(not size & (size - 1), f"BAR{index} has {size:#x} bytes, no power of two")
        for index, argsz, why in ((BOGUS, 32, "of region 1000"), (0, 8, "with argsz 8")):
            payload = _REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
            await refused(client, Command.DEVICE_GET_REGION_INFO, payload, why)


@wire_check(
    "vfio-user/irq-info",
    section="VFIO_USER_DEVICE_GET_IRQ_INFO",
    observe="INTx and MSI-X, an index that is not there, and an argsz that is too small",
)
async def irq_info(wire: Wire) -> None:
    """INTx and MSI-X can be asked for; an index that is not there is refused."""
    async with wire.connect() as client:
        for known in (PciIrq.INTX, PciIrq.MSIX):
            await client.irq_info(known)
        for index, argsz, why in ((BOGUS, 16, "of index 1000"), (0, 8, "with argsz 8")):
            await refused(client, Command.DEVICE_GET_IRQ_INFO, _IRQ_INFO.pack(argsz, 0, index, 0), why)


@wire_check(
    "qemu/reply-size",
    section="VFIO_USER_DEVICE_GET_REGION_INFO",
    observe="every command that QEMU sends while it starts, with a client that is as strict",
)
async def reply_size(wire: Wire) -> None:
    """No reply is larger than its request, or than argsz or count asked for: QEMU has no room for more."""
    async with wire.connect(QEMU_OPTIONS) as client:
        info = await client.device_info()
        for index in range(min(info.num_regions, 8)):
            await client.exchange(Command.DEVICE_GET_REGION_INFO, _REGION_INFO.pack(32, 0, index, 0, 0, 0))
        for index in range(min(info.num_irqs, 4)):
            await client.exchange(Command.DEVICE_GET_IRQ_INFO, _IRQ_INFO.pack(16, 0, index, 0))
        await client.region_read(PciRegion.CONFIG, 0, CFG_SPACE_SIZE)
        await client.region_write(PciRegion.CONFIG, 0x3C, b"\x0b")
        with SharedMemory(PAGE, address=FAR) as memory:
            await client.map_memory(memory)
            await client.unmap_memory(memory)
        await client.set_irqs(PciIrq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER)
        await client.device_reset()


# ---- region accesses ---------------------------------------------------------------------------------------------


@wire_check(
    "vfio-user/access-bounds",
    section="VFIO_USER_REGION_READ",
    observe="reads and writes past the end of config space, across it, at 2^64 - 2, and in a region that is not there",
)
async def access_bounds(wire: Wire) -> None:
    """An access outside of its region is refused."""
    async with wire.connect() as client:
        size = (await client.region_info(PciRegion.CONFIG)).size
        for region, offset, count in (
            (PciRegion.CONFIG, size, 1),
            (PciRegion.CONFIG, size - 2, 4),
            (PciRegion.CONFIG, (1 << 64) - 2, 4),
            (BOGUS, 0, 4),
        ):
            access = REGION_ACCESS_CODEC.pack(offset, region, count)
            why = f"of {count} bytes at {offset:#x} of region {region}"
            await refused(client, Command.REGION_READ, access, why)
            await refused(client, Command.REGION_WRITE, access + bytes(count), why)


@wire_check(
    "vfio-user/access-reply",
    section="VFIO_USER_REGION_READ",
    observe="payloads of the replies to a read and a write of config space",
)
async def access_reply(wire: Wire) -> None:
    """The reply repeats offset, region and count; a read's is followed by exactly the data, a write's by nothing."""
    async with wire.connect() as client:
        for count in (1, 2, 4, 256):
            access = REGION_ACCESS_CODEC.pack(0, PciRegion.CONFIG, count)
            reply = await client.exchange(Command.REGION_READ, access)
            expect(reply.payload[:16] == access, f"a read of {count} bytes is answered with {reply.payload[:16].hex()}")
            expect(len(reply.payload) == 16 + count, f"a read of {count} bytes has {len(reply.payload) - 16} of data")
        access = REGION_ACCESS_CODEC.pack(0x3C, PciRegion.CONFIG, 1)
        reply = await client.exchange(Command.REGION_WRITE, access + b"\x0b")
        expect(reply.payload == access, f"a write is answered with {reply.payload.hex() or 'nothing'}")


@wire_check(
    "vfio-user/write-data",
    section="VFIO_USER_REGION_WRITE",
    observe="REGION_WRITE of 4 bytes with 1 byte of data",
)
async def write_data(wire: Wire) -> None:
    """A write whose data is shorter than its count is refused."""
    async with wire.connect() as client:
        access = REGION_ACCESS_CODEC.pack(0x3C, PciRegion.CONFIG, 4)
        await refused(client, Command.REGION_WRITE, access + b"\x0b", "of 4 bytes with 1 byte of data")


@wire_check(
    "vfio-user/write-multi",
    section="VFIO_USER_REGION_WRITE_MULTI",
    observe="where write_multiple is negotiated: two writes in one message, the count in its reply, what is read then",
)
async def write_multi(wire: Wire) -> None:
    """REGION_WRITE_MULTI carries out all of its writes, in order."""
    async with wire.connect() as client:
        if client.version is None or not client.version.write_multiple:
            raise NotApplicable("needs write_multiple negotiated")
        line = 0x3C
        done = await client.region_write_multi([(PciRegion.CONFIG, line, b"\x11"), (PciRegion.CONFIG, line, b"\x22")])
        expect(done == 2, f"2 writes were sent, the reply says {done}")
        seen = await client.config_read(line, 1)
        expect(seen == 0x22, f"interrupt_line is {seen:#x} after writes of 0x11 and 0x22 in one message")


@check(
    "vfio-user/io-fds",
    section="VFIO_USER_DEVICE_GET_REGION_IO_FDS",
    observe="the ioeventfds of the notification structure's BAR: signal the one of the queue instead of writing",
    needs=(EXERCISE,),
)
async def io_fds(bench: Bench) -> None:
    """Signalling an ioeventfd is as good as the write that it stands for; a region that is not there is refused."""
    client, notify = bench.client, bench.layout.notify
    payload = _REGION_IO_FDS.pack(_REGION_IO_FDS.size, 0, BOGUS, 0)
    await refused(client, Command.DEVICE_GET_REGION_IO_FDS, payload, "of region 1000")
    ring = await bench.start()
    await bench.select(bench.queue)
    at = notify.offset + await bench.get("queue_notify_off") * notify.multiplier
    try:
        entries = await client.io_fds(notify.bar)
    except RemoteError as error:
        raise NotApplicable(f"the server has no ioeventfds ({error.strerror})") from None
    mine = [entry for entry in entries if entry.takes(at, 2, bench.queue)]
    if not mine:
        raise NotApplicable("the server has no ioeventfd for this queue")
    ring.offer(bench.chain(ring, bench.request()))
    os.eventfd_write(mine[0].fd, 1)
    await bench.wait_used(ring, 1)
