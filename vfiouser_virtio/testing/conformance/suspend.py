"""Device Suspend (virtio 1.4, 2.1 and 3.4): where the device offers SUSPEND."""

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, check, offers
from vfiouser_virtio.testing.conformance.verdicts import expect
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, FEATURES_OK

_SECTION = "Device Suspend"
_SUSPEND = int(DeviceStatus.SUSPEND)


async def _ask(bench: Bench, status: int, wanted: DeviceStatus) -> int:
    """Write a status, and wait until of SUSPEND and DRIVER_OK just one is set, or NEEDS_RESET; returns what is."""
    await bench.set("device_status", status)
    seen = 0

    async def ended() -> bool:
        nonlocal seen
        seen = await bench.get("device_status")
        return seen & (DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK) == wanted or bool(seen & DeviceStatus.NEEDS_RESET)

    otherwise = f"{status:#x} was written, the status has neither {wanted.name} alone of SUSPEND and DRIVER_OK, nor"
    await bench.until(ended, f"{otherwise} NEEDS_RESET")
    return seen


async def _suspend(bench: Bench) -> int:
    return await _ask(bench, DRIVER_OK | _SUSPEND, DeviceStatus.SUSPEND)


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
    expect(not seen & DeviceStatus.SUSPEND, f"device_status is {seen:#x} after SUSPEND was set before DRIVER_OK")


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
    await bench.serves_nothing(ring, "while suspended")


@check(
    "virtio14/SU3",
    section=_SECTION,
    observe="suspend, resume: each time the status gets there, or is NEEDS_RESET; then serve a request",
    needs=(EXERCISE, offers(Feature.SUSPEND)),
)
async def su3(bench: Bench) -> None:
    """A request to suspend, or to resume, ends in success or in NEEDS_RESET."""
    ring = await bench.start(Feature.SUSPEND)
    await bench.serve(ring)
    for _ in range(2):
        status = await _suspend(bench)
        if not status & DeviceStatus.NEEDS_RESET:
            status = await _ask(bench, status | DeviceStatus.DRIVER_OK, DeviceStatus.DRIVER_OK)
        if status & DeviceStatus.NEEDS_RESET:
            return
        await bench.serve(ring)
