"""Each profile, and each fault at every opportunity: the device's side stays sound, whatever its driver sees."""

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.faults import FAULTS, FaultPlan, Place
from vfiouser_virtio.faults.disk import FaultyDisk
from vfiouser_virtio.faults.profiles import PROFILES
from vfiouser_virtio.groups import leaves
from vfiouser_virtio.guest import DeviceBroken, DeviceGone, Disk
from vfiouser_virtio.guest.drivers.blk import RequestFailed
from vfiouser_virtio.testing.carriers import Carrier, carry
from vfiouser_virtio.virtio import Offer

pytestmark = [pytest.mark.slow, pytest.mark.variant]  # the rooms of faults have tests of their own

_ARGUMENTS = {"config-value": ":field=capacity", "interrupt-storm": ":times=3"}
# One request at a time, and a configuration that does not change, give no opportunity; nor does a driver with MSI-X
# that writes no configuration, and neither suspends the device nor resets a queue alone.
_NEVER = {
    *("used-id-of-another", "config-interrupt-lost", "config-write-lost", "queue-reset-stuck"),
    *("suspend-stuck", "suspend-refused", "isr-value", "isr-stuck", "intx-stuck"),
}
# What a driver may make of a device that lies: it says so, also that a queue is not there, and does not go on.
_EXPECTED = (DeviceBroken, DeviceGone, RequestFailed, LookupError)


async def use(plan: FaultPlan, carrier: Carrier, seconds: float, *, packed: bool) -> None:
    """A driver's work until it ends, or finds something wrong, or has waited for long enough."""
    disk = Blk(size=1 << 20, wrap_backend=FaultyDisk)
    try:
        with trio.move_on_after(seconds):
            async with carry(disk, carrier, offer=Offer(packed=packed, poll="off"), faults=plan) as found:
                drive: Disk = found.driver_data
                await drive.capacity()
                for number in range(100):
                    await drive.write(number, bytes(512))
                    await drive.read(number, 1)
                    if number % 10 == 0:
                        await drive.flush()
    except BaseException as error:
        unexpected = [leaf for leaf in leaves(error) if not isinstance(leaf, _EXPECTED)]
        if unexpected:
            raise


async def use_and_end(plan: FaultPlan, packed: bool, scope: trio.CancelScope) -> None:
    """The same over PCI, for a minute at most; then there is nothing left to wait for."""
    await use(plan, "socket-private", 60, packed=packed)
    scope.cancel()


def needs_pci(plan: FaultPlan) -> bool:
    return any(spec.fault.transport == "PCI" for spec in plan.specs)


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Bugs of ours, and blame for the driver: neither must be."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.exc_info or "broke virtio" in record.getMessage() or "a bug" in record.getMessage()
    ]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("carrier", ["socket", "socket-private"])
@pytest.mark.parametrize("profile", PROFILES)
async def test_profiles(profile: str, carrier: Carrier, packed: bool, caplog: pytest.LogCaptureFixture) -> None:
    plan = FaultPlan([f"profile:{profile}"], seed=3)
    await use(plan, carrier, 1, packed=packed)
    assert not complaints(caplog)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.devices in ("any", "blk")])
async def test_each_fault_often(
    name: str, packed: bool, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """What there are few opportunities for at each of them, the others at a third."""
    often = FAULTS[name].place in (Place.RING, Place.DATA, Place.INTERRUPT, Place.BLK) and name != "interrupt-early"
    plan = FaultPlan([f"{name}{_ARGUMENTS.get(name, '')}{':p=0.3' * often}"], seed=1)
    happens = FAULTS[name].ring in ("", "packed" if packed else "split") and name not in _NEVER
    if needs_pci(plan):
        autojump_clock.autojump_threshold = float("inf")  # sockets are no reason to wait that it knows
        autojump_clock.rate = 1
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use_and_end, plan, packed, scope)
                while happens and not plan.log.entries:
                    await trio.sleep(0.01)
                await trio.sleep(0.5)  # what the driver makes of it
                scope.cancel()
    else:
        await use(plan, "loopback", 10_000, packed=packed)
    assert bool(plan.log.entries) == happens
    assert not complaints(caplog)
