"""Stage of a case: a device on its function, what it may store, and the steps that there are for it."""

import inspect
from dataclasses import fields
from functools import cache, partial
from typing import Any, Protocol

from vfiouser_virtio.audit import AuditedVirtioPci, Findings
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.message_performer import MessagePerformer
from vfiouser_virtio.testing.fuzz.oracle import Bounds
from vfiouser_virtio.testing.fuzz.pci_bounds import PciBounds
from vfiouser_virtio.testing.fuzz.pci_performer import PciPerformer, PowerOn
from vfiouser_virtio.testing.fuzz.pci_target import PciTarget
from vfiouser_virtio.testing.fuzz.perform import Performer
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.store_bounds import StoreBounds
from vfiouser_virtio.testing.fuzz.targets import FuzzTarget
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.transports.served_function import ServedFunction
from vfiouser_virtio.virtio import Offer


class Stage(Protocol):
    """One device, for one case."""

    @property
    def function(self) -> ServedFunction: ...

    @property
    def learns(self) -> bool:
        """Whether a good client comes first, to look at the new device."""
        ...

    def prepare(self) -> None:
        """Make what is made once and kept for ever: it is no leak."""
        ...

    def bounds(self, ram: FuzzRam) -> StoreBounds:
        """What the device may store in a client's memory."""
        ...

    def performer(
        self, client: FuzzClient, ram: FuzzRam, bounds: StoreBounds, case: Case
    ) -> MessagePerformer[Any, Any]:
        """The steps of one client."""
        ...


class VirtioStage:
    """Virtio device."""

    learns = False

    def __init__(self, target: FuzzTarget, case: Case) -> None:
        self._target = target
        made = partial(AuditedVirtioPci, findings=Findings(case.target)) if case.audited else VirtioPci
        self.function: VirtioPci = made(target.make(), name=case.target, offer=Offer(**case.offer))

    def prepare(self) -> None:
        """Eventfds of its queues."""
        self.function.io_fds(VIRTIO_BAR)

    def bounds(self, ram: FuzzRam) -> Bounds:
        """Its rings, and the buffers in them."""
        return Bounds(ram, self.function.core, takes_pages=self._target.type.takes_pages)

    def performer(self, client: FuzzClient, ram: FuzzRam, bounds: StoreBounds, case: Case) -> Performer:
        """Its driver has rings."""
        assert isinstance(bounds, Bounds)
        return Performer(client, ram, bounds, case, self._target, self.function if case.direct else None)


class PciStage:
    """PCI device of an author's own."""

    learns = True

    def __init__(self, target: PciTarget) -> None:
        self._map = target.map
        self._power_on = PowerOn()
        # No watch for registers that are polled, which a fuzzer's are.
        self.function = PciDeviceFunction(target.make(), name="fuzzed", spin=0)

    def prepare(self) -> None:
        """Memfds of its BARs."""

    def bounds(self, ram: FuzzRam) -> PciBounds:
        """Memory that is mapped."""
        return PciBounds(ram)

    def performer(self, client: FuzzClient, ram: FuzzRam, bounds: StoreBounds, case: Case) -> PciPerformer:
        """Its driver has registers."""
        assert isinstance(bounds, PciBounds)
        return PciPerformer(client, ram, bounds, case, self._map, self.function, self._power_on)


def stage(target: FuzzTarget | PciTarget, case: Case) -> Stage:
    """The stage for a target."""
    return PciStage(target) if isinstance(target, PciTarget) else VirtioStage(target, case)


def check_steps(case: Case, target: FuzzTarget | PciTarget) -> None:
    """Raise ValueError for a step that there is not for a target, or that has other parameters than its kind has."""
    performer = PciPerformer if isinstance(target, PciTarget) else Performer
    for number, step in enumerate(case.steps):
        if step == {"do": "case", "number": step.get("number")}:  # of those that were joined
            continue
        if step.get("do") == "client":
            unknown = step.keys() - {"do", *(field.name for field in fields(Case))}
            said = f"no key {min(unknown)!r}" if unknown else ""
        else:
            said = _complaint(performer, step.get("do"), frozenset(step) - {"do"})
        if said:
            raise ValueError(f"step {number}, {step.get('do')!r}: {said}")


@cache
def _complaint(performer: type[MessagePerformer[Any, Any]], name: object, parameters: frozenset[str]) -> str:
    method = getattr(performer, f"do_{name}", None)
    if method is None:
        return "there is no such step"
    try:
        inspect.signature(method).bind(None, **dict.fromkeys(parameters))
    except TypeError as error:
        return str(error)
    return ""
