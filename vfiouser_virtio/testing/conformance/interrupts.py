"""ISR status (virtio 1.4, 4.1.4.5), MSI-X vectors and interrupts (4.1.5.1.2 to 4.1.5.4)."""

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import TYPE0_HEADER, PciStatus
from vfiouser_virtio.protocols.vfio_user import PciIrq
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.pci import NO_VECTOR, Isr
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, INTX, MSIX, check
from vfiouser_virtio.testing.conformance.verdicts import Failed, NotApplicable, expect, note

_ISR = "ISR status capability"
_VECTORS = "MSI-X Vector Configuration"
_STATUS = offsets(TYPE0_HEADER)["status"]
_MAX_VECTORS = 0x800


async def _break(bench: Bench) -> None:
    """Cause a configuration change notification, the only one that every device has: that of NEEDS_RESET."""
    ring = await bench.new_ring()
    await bench.driver_ok()
    ring.offer(0xFFFF)
    await bench.kick()

    async def told() -> bool:
        return await bench.get("device_status") & DeviceStatus.NEEDS_RESET != 0

    try:
        await bench.until(told, "no NEEDS_RESET")
    except Failed as error:
        raise NotApplicable("the device does not set NEEDS_RESET, so nothing makes it notify") from error


@check(
    "virtio14/IS1",
    section=_ISR,
    observe="without MSI-X, read ISR status twice after a request",
    needs=(EXERCISE,),
)
async def is1(bench: Bench) -> None:
    """There is an ISR status structure, and reading it clears it."""
    ring = await bench.start()
    await bench.isr()
    await bench.serve(ring)
    first, second = await bench.wait_isr(Isr.QUEUE), await bench.isr()
    expect(first == Isr.QUEUE, f"ISR status is {first:#x} after a used buffer without MSI-X")
    expect(second == 0, f"ISR status is {second:#x} when it is read a second time")


@check(
    "virtio14/IS2",
    section=_ISR,
    observe="break a ring so that NEEDS_RESET is notified, with MSI-X on: its vector fires, and bit 1 is set",
    needs=(EXERCISE, MSIX),
)
async def is2(bench: Bench) -> None:
    """Bit 1 of ISR status is set before a configuration change notification, with MSI-X, too."""
    interrupts = await bench.use_msix()
    await bench.negotiate()
    await bench.set("config_msix_vector", 0)
    await _break(bench)
    await interrupts.wait(0, 1, "NEEDS_RESET is set, and vector 0 is config_msix_vector")
    seen = await bench.isr()
    expect(bool(seen & Isr.CONFIG), f"ISR status is {seen:#x} at a configuration change interrupt")


@check(
    "virtio14/IS3",
    section=_ISR,
    observe="bit 3 of PCI status after a request without MSI-X, and after ISR status was read; the INTx eventfd",
    needs=(EXERCISE, INTX),
)
async def is3(bench: Bench) -> None:
    """PCI Interrupt Status is set while ISR status is not 0; INTx is asserted then, and de-asserted by reading it."""
    interrupts = await bench.use_intx()
    ring = await bench.start()
    await bench.isr()
    for count in (1, 2):  # the second one only comes where reading has de-asserted the line
        await bench.serve(ring)
        await interrupts.wait(0, count, f"buffer {count} is used, MSI-X is off, ISR status was read before")
        status = await bench.client.config_read(*_STATUS)
        expect(bool(status & PciStatus.INTERRUPT), f"PCI status is {status:#x} while INTx is asserted")
        seen = await bench.isr()
        expect(bool(seen & Isr.QUEUE), f"ISR status is {seen:#x} at a used buffer interrupt")
        status = await bench.client.config_read(*_STATUS)
        expect(not status & PciStatus.INTERRUPT, f"PCI status is {status:#x} after ISR status was read")


@check(
    "virtio14/MX1",
    section=_VECTORS,
    observe="map every vector of the table to configuration changes and to a queue, read back, unmap; count of irqs",
    needs=(MSIX,),
)
async def mx1(bench: Bench) -> None:
    """The Table Size is true: any event can be mapped to any vector, and unmapped. It SHOULD be 2 to 0x800."""
    msix = bench.info.msix
    assert msix is not None
    count = (await bench.client.irq_info(PciIrq.MSIX)).count
    note(count == msix.vectors, f"MSI-X has {msix.vectors} vectors by its capability, {count} by GET_IRQ_INFO")
    note(2 <= msix.vectors <= _MAX_VECTORS, f"Table Size says {msix.vectors} vectors, not 2 to 2048")
    await bench.negotiate()
    await bench.select(0)
    for name in ("config_msix_vector", "queue_msix_vector"):
        for vector in (*range(min(msix.vectors, 64)), msix.vectors - 1, NO_VECTOR):
            await bench.set(name, vector)
            seen = await bench.get(name)
            note(seen == vector, f"{name}: {vector:#x} of {msix.vectors:#x} was written, {seen:#x} is read")


@check(
    "virtio14/MX2",
    section=_VECTORS,
    observe="write a vector beyond the table, read; map vectors, reset, read",
    needs=(MSIX,),
)
async def mx2(bench: Bench) -> None:
    """A vector that cannot be mapped reads back as NO_VECTOR, and so do all after a reset."""
    msix = bench.info.msix
    assert msix is not None
    await bench.negotiate()
    for queue in range(await bench.get("num_queues")):
        await bench.select(queue)
        seen = await bench.get("queue_msix_vector")
        note(seen == NO_VECTOR, f"queue_msix_vector of queue {queue} is {seen:#x} after a reset")
    await bench.select(0)
    for name in ("config_msix_vector", "queue_msix_vector"):
        if msix.vectors <= _MAX_VECTORS - 1:
            await bench.set(name, msix.vectors)
            seen = await bench.get(name)
            note(seen == NO_VECTOR, f"{name} is {seen:#x} after {msix.vectors:#x} of as many was written")
        await bench.set(name, 0)
        note(await bench.get(name) == 0, f"{name} cannot be mapped to vector 0")
    await bench.reset()
    await bench.select(0)
    for name in ("config_msix_vector", "queue_msix_vector"):
        seen = await bench.get(name)
        note(seen == NO_VECTOR, f"{name} is {seen:#x} after a reset")


@check(
    "virtio14/MX3",
    section="Used Buffer Notifications",
    observe="serve requests with MSI-X on and queue_msix_vector NO_VECTOR, then with a vector",
    needs=(EXERCISE, MSIX),
)
async def mx3(bench: Bench) -> None:
    """With MSI-X on, a queue without a vector causes no interrupt, and one with a vector causes that."""
    interrupts = await bench.use_msix()
    ring = await bench.start()
    await bench.serve(ring)
    await bench.quiet()
    expect(not any(interrupts.counts), f"vectors fired {interrupts.counts}, but the queue has none")
    vector = len(interrupts.counts) - 1
    ring = await bench.start(vector=vector)
    await bench.serve(ring)
    await interrupts.wait(vector, 1, f"a buffer is used, queue_msix_vector is {vector}")
    expect(
        sum(interrupts.counts) == interrupts.counts[vector], f"vectors fired {interrupts.counts}, not {vector} alone"
    )
