"""vfio-user (QEMU docs/interop/vfio-user.rst): memory, interrupts and reset."""

import os

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    DMA_UNMAP,
    IRQ_SET,
    Command,
    IrqSetFlags,
    MessageFlags,
    PciIrq,
)
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import ADVICE, EXERCISE, MSIX, SHOULD, check, wire_check
from vfiouser_virtio.testing.conformance.verdicts import Failed, NotApplicable, expect
from vfiouser_virtio.testing.conformance.wire import BOGUS, FAR, PAGE, Wire, refused
from vfiouser_virtio.vfio_user import TWIN_VERSION, ClientOptions, SharedMemory

_DMA_MAP, _DMA_UNMAP, _IRQ_SET = codec(DMA_MAP), codec(DMA_UNMAP), codec(IRQ_SET)
_TRIGGER_FD = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER


# ---- memory ------------------------------------------------------------------------------------------------------


@wire_check(
    "vfio-user/dma-map-argsz",
    section="VFIO_USER_DMA_MAP",
    keyword=ADVICE,
    observe="DMA_MAP with argsz 8, of size 0, of a range that ends beyond 2^64",
)
async def dma_map_argsz(wire: Wire) -> None:
    """A DMA_MAP with too small an argsz, or of what is no range, is refused."""
    async with wire.connect() as client:
        for argsz, address, size, why in (
            (8, FAR, PAGE, "with argsz 8"),
            (_DMA_MAP.size, FAR, 0, "of size 0"),
            (_DMA_MAP.size, (1 << 64) - PAGE, 2 * PAGE, "of a range that ends beyond 2^64"),
        ):
            await refused(client, Command.DMA_MAP, _DMA_MAP.pack(argsz, 3, 0, address, size), why)


@wire_check(
    "vfio-user/dma-map-overlap",
    section="VFIO_USER_DMA_MAP",
    keyword=SHOULD,
    observe="DMA_MAP of a range that is mapped already",
)
async def dma_map_overlap(wire: Wire) -> None:
    """A DMA_MAP that overlaps an earlier one is refused, as VFIO does."""
    async with wire.connect() as client:
        with SharedMemory(2 * PAGE, address=FAR) as memory:
            await client.map_memory(memory)
            payload = _DMA_MAP.pack(_DMA_MAP.size, 3, 0, FAR + PAGE, 2 * PAGE)
            await refused(client, Command.DMA_MAP, payload, "over an earlier mapping")


@wire_check(
    "vfio-user/dma-map-short-file",
    section="VFIO_USER_DMA_MAP",
    keyword=ADVICE,
    observe="DMA_MAP of 1 MiB of a file of 4 KiB, then DEVICE_GET_INFO",
)
async def dma_map_short_file(wire: Wire) -> None:
    """A file that is shorter than the mapping is refused: touching it would kill the server."""
    fd = os.memfd_create("short", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE)
        async with wire.connect() as client:
            reply = await client.exchange(Command.DMA_MAP, _DMA_MAP.pack(_DMA_MAP.size, 3, 0, FAR, 256 * PAGE), [fd])
            expect(bool(reply.flags & MessageFlags.ERROR), "1 MiB of a file of 4 KiB was mapped")
            await client.device_info()
    finally:
        os.close(fd)


@wire_check(
    "vfio-user/dma-unmap-reply",
    section="VFIO_USER_DMA_UNMAP",
    observe="payload of the reply (rust-vmm waits for it)",
)
async def dma_unmap_reply(wire: Wire) -> None:
    """The reply to DMA_UNMAP repeats its structure of 24 bytes."""
    async with wire.connect() as client:
        with SharedMemory(PAGE, address=FAR) as memory:
            await client.map_memory(memory)
            reply = await client.exchange(Command.DMA_UNMAP, _DMA_UNMAP.pack(_DMA_UNMAP.size, 0, FAR, PAGE))
            seen = reply.payload.hex() or "nothing"
            expect(len(reply.payload) == _DMA_UNMAP.size, f"the payload is {seen}")


@wire_check(
    "qemu/dma-unmap-nothing",
    section="VFIO_USER_DMA_UNMAP",
    keyword=ADVICE,
    observe="DMA_UNMAP of what was never mapped, and of a range with a mapping inside, as with a vIOMMU",
)
async def dma_unmap_nothing(wire: Wire) -> None:
    """DMA_UNMAP takes away every mapping inside its range, and succeeds when there is none."""
    async with wire.connect() as client:
        await client.dma_unmap(FAR, PAGE)
        with SharedMemory(PAGE, address=FAR + PAGE) as memory:
            await client.map_memory(memory)
            await client.dma_unmap(FAR, 8 * PAGE)
            await client.map_memory(memory)


@wire_check(
    "vfio-user/dma-messages",
    section="VFIO_USER_DMA_READ",
    observe="a request through memory without a file descriptor",
)
async def dma_messages(wire: Wire) -> None:
    """Memory that came without a file descriptor is reached with DMA_READ and DMA_WRITE."""
    async with Bench.open(wire, private=True) as bench:
        if bench.exercise is None:
            raise NotApplicable(f"needs {EXERCISE.text}")
        await bench.serve(await bench.start(), plain=False)


@wire_check(
    "vfio-user/twin-socket",
    section="VFIO_USER_VERSION",
    observe="propose a twin socket; where there is one, a request through memory without a file descriptor, "
    "and from which socket DMA_READ and DMA_WRITE come",
)
async def twin_socket(wire: Wire) -> None:
    """With a twin socket all DMA_READ and DMA_WRITE go through that."""
    async with Bench.open(wire, options=ClientOptions(version=TWIN_VERSION), private=True) as bench:
        if bench.exercise is None:
            raise NotApplicable(f"needs {EXERCISE.text}")
        version = bench.client.version
        if version is None or version.twin_fd_index is None:
            raise NotApplicable("the server has no twin sockets")
        try:
            await bench.serve(await bench.start(), plain=False)
        except Failed:
            if bench.client.alive and not bench.client.dma_messages:
                raise NotApplicable("the server sends neither, with a twin socket or without (dma-messages)") from None
            raise


# ---- interrupts and reset ----------------------------------------------------------------------------------------


@check(
    "vfio-user/set-irqs-refused",
    section="VFIO_USER_DEVICE_SET_IRQS",
    observe="argsz 8, two DATA bits, no ACTION bit, vectors beyond the last, an index that is not there",
    needs=(MSIX,),
)
async def set_irqs_refused(bench: Bench) -> None:
    """SET_IRQS with malformed flags, or for interrupts that are not there, is refused."""
    client, msix = bench.client, bench.info.msix
    assert msix is not None
    size = _IRQ_SET.size
    disable = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
    for argsz, flags, index, start, count, why in (
        (8, disable, PciIrq.MSIX, 0, 0, "with argsz 8"),
        (size, _TRIGGER_FD | IrqSetFlags.DATA_NONE, PciIrq.MSIX, 0, 1, "with two DATA bits"),
        (size, IrqSetFlags.DATA_NONE, PciIrq.MSIX, 0, 1, "without an ACTION bit"),
        (size, _TRIGGER_FD, PciIrq.MSIX, msix.vectors, 1, "of a vector beyond the last"),
        (size, _TRIGGER_FD, PciIrq.MSIX, 0xFFFF_FFFF, 2, "of vector 2^32 - 1"),
        (size, disable, BOGUS, 0, 0, "of index 1000"),
    ):
        await refused(client, Command.DEVICE_SET_IRQS, _IRQ_SET.pack(argsz, flags, index, start, count), why)


@check(
    "vfio-user/irq-trigger",
    section="VFIO_USER_DEVICE_SET_IRQS",
    observe="eventfds in two messages; DATA_NONE and TRIGGER for each: which eventfd is signalled",
    needs=(MSIX,),
)
async def irq_trigger(bench: Bench) -> None:
    """Eventfds that come in several messages add up, and ACTION_TRIGGER signals the ones that it names."""
    interrupts = await bench.use_msix()
    trigger = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER
    last = len(interrupts.counts) - 1
    reply = await bench.client.exchange(
        Command.DEVICE_SET_IRQS, _IRQ_SET.pack(_IRQ_SET.size, trigger, PciIrq.MSIX, last, 1)
    )
    if reply.flags & MessageFlags.ERROR:
        raise NotApplicable(f"the server does not trigger interrupts for its client (errno {reply.error})")
    await interrupts.wait(last, 1, f"SET_IRQS has triggered vector {last}")
    expect(sum(interrupts.counts) == 1, f"vectors fired {interrupts.counts}, not {last} alone")


@check(
    "qemu/reset-keeps-memory",
    section="VFIO_USER_DEVICE_RESET",
    observe="DEVICE_RESET, then a request with MSI-X, without mapping memory again",
    needs=(EXERCISE, MSIX),
)
async def reset_keeps_memory(bench: Bench) -> None:
    """DEVICE_RESET resets the device, and leaves the client's memory mapped."""
    await bench.serve(await bench.start())
    await bench.client.device_reset()
    await bench.enable_function()
    seen = await bench.get("device_status")
    expect(seen == 0, f"device_status is {seen:#x} after DEVICE_RESET")
    interrupts = await bench.use_msix()
    ring = await bench.start(vector=0)
    await bench.serve(ring)
    await interrupts.wait(0, 1, "a buffer is used after DEVICE_RESET")
