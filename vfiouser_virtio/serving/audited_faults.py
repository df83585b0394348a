"""Audit of the driver of a device that lies: both kinds of ring and the PCI function, watched, and with faults.

Here because neither of the two packages knows the other. A watch is told what the driver is told: a buffer is in flight
until its driver has it back, whatever a lie has said of it.
"""

from functools import partial
from typing import Any

from vfiouser_virtio.audit import AuditedVirtioPci, Findings
from vfiouser_virtio.audit.virtqueue import AuditedPackedRing, AuditedSplitRing, AuditedVirtqueue
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import FaultyCore
from vfiouser_virtio.faults.packed import FaultyPackedRing
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.faults.rings import RingPlace, UsedElement
from vfiouser_virtio.faults.split import FaultySplitRing
from vfiouser_virtio.faults.virtqueue import FaultyVirtqueue
from vfiouser_virtio.virtio import Device


class AuditedFaultySplitRing(AuditedSplitRing, FaultySplitRing):
    """Split ring with faults, and a watch."""

    def _put_used(self, elements: list[UsedElement]) -> list[RingPlace]:
        heads = [each.head for each in elements if each.head is not None]
        self.findings.tell(self.watch.stores, self.parts, self.used_idx)
        self.findings.tell(self.watch.uses, self.parts, heads, self.memory)
        return super()._put_used(elements)


class AuditedFaultyPackedRing(AuditedPackedRing, FaultyPackedRing):
    """Packed ring with faults, and a watch."""

    def _put_used(self, elements: list[UsedElement]) -> list[RingPlace]:
        places, position = [], self.next_used
        for each in elements:
            if each.head is not None and not each.extra:
                places.append((each.head, position % self.size, each.slots))
            if not each.extra:
                position += each.slots
        self.findings.tell(self.watch.uses, self.parts, places)
        return super()._put_used(elements)


class AuditedFaultyVirtqueue(AuditedVirtqueue, FaultyVirtqueue):
    """Virtqueue with such rings."""

    split_ring = AuditedFaultySplitRing
    packed_ring = AuditedFaultyPackedRing


class AuditedFaultyPci(AuditedVirtioPci, FaultyPci):
    """`AuditedVirtioPci` of a device with faults; its findings say which faults there had been."""

    def __init__(self, device: Device, *, findings: Findings, faults: FaultPlan, **named: Any) -> None:
        findings.faults = partial(_until_now, faults)
        core = partial(FaultyCore, faults=faults, transport="PCI", virtqueue=AuditedFaultyVirtqueue)
        super().__init__(device, findings=findings, faults=faults, core=core, **named)


def _until_now(faults: FaultPlan) -> str:
    log = faults.log
    last = next((entry for entry in reversed(log.entries) if "fault" in entry), None)
    if last is None:
        return "none before it"
    where = "" if last["queue"] is None else f" of queue {last['queue']}"
    return f"{log.faults} before it, the last of them {last['fault']}, n={last['n']}{where}: {last['did']}"
