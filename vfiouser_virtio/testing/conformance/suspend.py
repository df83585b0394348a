"""Device Suspend (virtio 1.4, 2.1 and 3.4): where the device offers SUSPEND."""

from vfiouser_virtio.protocols.virtio.features import Feature, Status
from vfiouser_virtio.protocols.virtio.pci import Isr
from vfiouser_virtio.testing.conformance.bench import DRIVER_OK, FEATURES_OK, Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, check, offers
from vfiouser_virtio.testing.conformance.verdicts import expect

_SECTION = "Device Suspend"
_SUSPEND = int(Status.SUSPEND)


async def _suspend(bench: Bench) -> int:
    """Ask for it, and wait for the end of it; returns the status then."""
    await bench.set("device_status", DRIVER_OK | _SUSPEND)
    status = 0

    async def ended() -> bool:
        nonlocal status
        status = await bench.get("device_status")
        suspended = status & (Status.SUSPEND | Status.DRIVER_OK) == Status.SUSPEND
        return suspended or bool(status & Status.NEEDS_RESET)

    await bench.until(ended, "SUSPEND was set, the status is neither SUSPEND without DRIVER_OK nor NEEDS_RESET")
    return status


@check(
    "virtio14/SU1",
    section=_SECTION,
    observe="set SUSPEND with FEATURES_OK, before DRIVER_OK; read the status",
    needs=(offers(Feature.SUSPEND),),
)
async def su1(bench: Bench) -> None:
    """SUSPEND is ignored before the device is fully initialised."""
    await bench.negotiate(Feature.SUSPEND)
    await bench.set("device_status", FEATURES_OK | _SUSPEND)
    seen = await bench.get("device_status")
    expect(not seen & Status.SUSPEND, f"device_status is {seen:#x} after SUSPEND was set before DRIVER_OK")


@check(
    "virtio14/SU2",
    section=_SECTION,
    observe="suspend, make a buffer available, notify; watch used.idx and ISR status",
    needs=(EXERCISE, offers(Feature.SUSPEND)),
)
async def su2(bench: Bench) -> None:
    """While it is suspended the device touches no queue and sends no notifications."""
    ring = await bench.start(Feature.SUSPEND)
    await bench.serve(ring)
    await _suspend(bench)
    await bench.isr()
    ring.offer(bench.chain(ring, bench.request()))
    await bench.kick()
    await bench.quiet()
    expect(ring.used_idx == 1, f"used.idx became {ring.used_idx:#x} while suspended")
    seen = await bench.isr()
    expect(not seen & Isr.QUEUE, f"ISR status is {seen:#x} while suspended")


@check(
    "virtio14/SU3",
    section=_SECTION,
    observe="suspend; the status becomes SUSPEND without DRIVER_OK, or NEEDS_RESET",
    needs=(EXERCISE, offers(Feature.SUSPEND)),
)
async def su3(bench: Bench) -> None:
    """A request to suspend ends in success or in NEEDS_RESET."""
    ring = await bench.start(Feature.SUSPEND)
    await bench.serve(ring)
    await _suspend(bench)
