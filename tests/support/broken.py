"""A table of deliberately broken servers: for each conformance check, a small change of ours that it must see."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.virtio import Device, DeviceCore, Offer, Virtqueue
from vfiouser_virtio.vring import PackedRing, SplitRing

Make = Callable[..., VirtioPci]
"""As `VirtioPci`: from a device, with ``ids=`` and ``offer=``."""


@dataclass(frozen=True)
class Broken:
    """What makes a device with a fault, or sessions that have one, and the device type that shows it."""

    make: Make
    session: type[Session]
    device: str
    offer: Offer
    logs: str
    """A regular expression that is found in each line that it logs; "": it logs nothing."""
    also: tuple[str, ...] = ()
    """Other checks that see the same fault."""


BROKEN: dict[str, Broken] = {}
"""By the id of the check that must fail."""


def breaks(
    *check_ids: str, device: str = "rng", logs: str = "", also: tuple[str, ...] = (), **offer: Any
) -> Callable[[Any], Any]:
    """Register a fault for one or several checks, of a device that offers this.

    It is a subclass of one of our classes, that takes its place: `Session`, or one of those that `made_with` takes.

    ``logs`` is what the intended fault, or the check itself, makes the server log: warnings and errors. Any other line
    fails the test, and so does a traceback: the check has then seen something else than what it is there for.

    ``also`` are other checks that see this fault; the others of its device type pass, where a test looks.
    """

    def register(fault: type) -> type:
        of_protocol = issubclass(fault, Session)
        make, session = (VirtioPci, fault) if of_protocol else (made_with(fault), Session)
        for check_id in check_ids:
            assert check_id not in BROKEN, check_id
            BROKEN[check_id] = Broken(make, session, device, Offer(**offer), logs, also)
        return fault

    return register


def faulty(*faults: str) -> Make:
    """What makes a device with these faults (see `vfiouser_virtio.faults`)."""
    return lambda device, **named: FaultyPci(device, faults=FaultPlan(faults, seed=1), **named)


def breaks_by_fault(check_id: str, *faults: str, device: str = "rng", logs: str = "", **offer: Any) -> None:
    """As `breaks`: these faults are what the check must see."""
    assert check_id not in BROKEN, check_id
    BROKEN[check_id] = Broken(faulty(*faults), Session, device, Offer(**offer), logs)


def made_with(fault: type, make: type[VirtioPci] = VirtioPci) -> Make:
    """What makes a device whose function, registers, core, virtqueues or rings are of this class; or that is one."""
    if issubclass(fault, VirtioPci):
        return fault
    if issubclass(fault, Net):
        return lambda device, **named: make(fault(netdev=device.netdev), **named)
    if issubclass(fault, Device):
        return lambda _device, **named: make(fault(), **named)
    if issubclass(fault, CommonCfg):
        return type(fault.__name__, (make,), {"common_cfg": fault})
    if issubclass(fault, DeviceCore):
        return functools.partial(make, core=fault)
    if issubclass(fault, Virtqueue):
        return functools.partial(make, core=functools.partial(DeviceCore, virtqueue=fault))
    assert issubclass(fault, SplitRing | PackedRing), fault
    kind = "split_ring" if issubclass(fault, SplitRing) else "packed_ring"
    return made_with(type(fault.__name__, (Virtqueue,), {kind: fault}), make)
