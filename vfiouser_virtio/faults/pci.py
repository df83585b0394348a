"""PCI function with faults: registers, capabilities, and a core with the others."""

from functools import partial
from typing import Any

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.faults.control import FaultControl
from vfiouser_virtio.faults.core import FaultyCore
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.faults.registers import FaultyCommonCfg
from vfiouser_virtio.pci import Capability
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import TYPE0_HEADER, CapId
from vfiouser_virtio.transports.pci import COMMON, VirtioPci
from vfiouser_virtio.vfio_device import AnswerLater, Buffer, Hold
from vfiouser_virtio.virtio import Device

_HEADER = offsets(TYPE0_HEADER)
# Of struct virtio_pci_cap.
_CFG_TYPE, _OFFSET = 3, 8
# Beyond every BAR that a device of ours has.
_OUTSIDE = 0x1000_0000


class FaultyPci(VirtioPci):
    """Virtio device on PCI with the faults of a plan; the rest is as with `VirtioPci`.

    ``control``, which is closed in the end, stops and starts them. ``core`` makes a `FaultyCore` of these faults, where
    another one is wanted.
    """

    common_cfg = FaultyCommonCfg

    def __init__(self, device: Device, *, faults: FaultPlan, control: FaultControl | None = None, **named: Any) -> None:
        self.faults = faults
        self._control = control
        self._gone_until = float("-inf")
        self._late: set[Hold] = set()
        """Answers that are still to be sent."""
        named.setdefault("core", partial(FaultyCore, faults=faults, transport="PCI"))
        super().__init__(device, **named)
        assert isinstance(self.core, FaultyCore)
        self.core.add_act("intx-spurious", self._assert_intx, at_kicks=True)
        self.core.add_act("registers-all-ones", self._go)

    async def serve(self) -> None:
        """As `VirtioPci.serve`."""
        if self._control is None:
            await super().serve()
            return
        with self._control as control:
            async with background() as tasks:
                tasks.start_soon(control.serve)
                await super().serve()

    # ---- capabilities --------------------------------------------------------------------------------------------

    def _add_capabilities(self, vectors: int) -> None:
        super()._add_capabilities(vectors)
        if hit := self.faults.hit("capability-loop"):
            first = last = self.config.load(*_HEADER["capability_list"])
            while following := self.config.load(last + 1, 1):
                last = following
            hit.did(f"the last capability, at {last:#x}, points to the first, at {first:#x}")
            self.config.define_bits(last + 1, bytes([first]))

    def add_capability(self, capability: Capability) -> int:
        """As `PciFunction.add_capability`."""
        data = bytearray(capability.data)
        if data[0] == CapId.VNDR:
            kind = data[_CFG_TYPE]
            for name, offset in (("capability-outside", _OUTSIDE), ("capability-overlap", COMMON)):
                for hit in self.faults.hits(name, lambda given: given["type"] == kind):
                    hit.did(f"structure {kind} is said to be at {offset:#x}")
                    data[_OFFSET : _OFFSET + 4] = offset.to_bytes(4, "little")
            if hits := self.faults.hits("capability-missing", lambda given: given["type"] == kind):
                for hit in hits:
                    hit.did(f"structure {kind} has no capability")
                data[0] = 0  # the null capability
        return super().add_capability(capability._replace(data=bytes(data)))

    # ---- INTx ----------------------------------------------------------------------------------------------------

    def _read_isr(self) -> bytes:
        value = self._isr
        lie, stuck, line = (self.faults.hit(name) for name in ("isr-value", "isr-stuck", "intx-stuck"))
        data = super()._read_isr()
        if lie:
            lie.did(f"ISR status reads as {lie['value'] & 0xFF:#x} instead of {value:#x}")
            data = bytes([lie["value"] & 0xFF])
        if stuck:
            stuck.did(f"ISR status stays {value:#x}")
            self._isr = value
        if line:
            line.did(f"INTx stays {'asserted' if value else 'as it is'}")
        if value and (stuck or line) and not self.msix_enabled:
            self.set_intx(True)
        return data

    def _assert_intx(self, hit: Hit) -> None:
        if self.msix_enabled:
            hit.did("nothing: MSI-X is on")
            return
        hit.did("INTx is asserted")
        self.set_intx(True)

    # ---- surprise removal ----------------------------------------------------------------------------------------

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        """As `PciFunction.region_read`, or all ones."""
        data = super().region_read(index, offset, count)
        # Counted while it is gone, too: how often a driver looks then has nothing to do with what comes later.
        if hit := self.faults.hit("registers-all-ones", possible=not self._is_gone()):
            self._go(hit)
        if self._is_gone():
            data = b"\xff" * count
        if late := self.faults.hit("register-read-late"):
            self._answer_later(late, bytes(data))
        return data

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        """As `PciFunction.region_write`, or without effect."""
        if not self._is_gone():
            super().region_write(index, offset, data)
        if late := self.faults.hit("register-write-late"):
            self._answer_later(late)

    def _go(self, hit: Hit) -> None:
        seconds = hit["time"]
        hit.did(f"gone {'for ever' if seconds is None else f'for {seconds:g} s'}")
        self._gone_until = float("inf") if seconds is None else trio.current_time() + seconds

    def _is_gone(self) -> bool:
        return self._gone_until > 0 and (self._gone_until == float("inf") or trio.current_time() < self._gone_until)

    # ---- late answers --------------------------------------------------------------------------------------------

    def disconnected(self) -> Hold | None:
        """As `PciFunction.disconnected`; what is still to be answered keeps no other client waiting."""
        for hold in tuple(self._late):
            self._answer_now(hold)
        return super().disconnected()

    def _answer_later(self, hit: Hit, data: bytes = b"") -> None:
        """Raises AnswerLater, unless nothing can wait."""
        assert isinstance(self.core, FaultyCore)
        hold = Hold()
        if self.core.later(hit["time"], partial(self._answer_now, hold)):
            hit.did(f"answered {hit['time']:g} s later")
            self._late.add(hold)
            raise AnswerLater(hold, data)
        hit.did("answered at once")

    def _answer_now(self, hold: Hold) -> None:
        if hold in self._late:
            self._late.discard(hold)
            hold.finish()
