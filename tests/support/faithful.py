"""Devices that have, and rightly, what ours do not have: the checks of it must pass on them.

They are as simple as they can be, and only good for that.
"""

import importlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
from support.broken import after, around

from vfiouser_virtio.pci import vendor_capability
from vfiouser_virtio.protocols.virtio.features import Feature, Status
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, CfgType
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.vfio_user import Server
from vfiouser_virtio.virtio import Transport
from vfiouser_virtio.virtio.queue import Queue
from vfiouser_virtio.vring import Chain, SplitRing

_transport: Any = importlib.import_module("vfiouser_virtio.virtio.transport")
_queue: Any = importlib.import_module("vfiouser_virtio.virtio.queue")

DESC = struct.Struct("<QIHH")
AVAIL, USED = 1 << 7, 1 << 15


def offer(patch: pytest.MonkeyPatch, bits: int, without: int = 0) -> None:
    """Offer other reserved features."""
    patch.setattr(_transport, "OFFERED", (_transport.OFFERED | bits) & ~without)


def answer_register(patch: pytest.MonkeyPatch, name: str, value: Callable[[CommonCfg, Callable[[], int]], int]) -> None:
    """A register of the common configuration reads as ``value(cfg, original)``."""

    def install(self: CommonCfg, *_: Any) -> None:
        original = self._getters[name]
        self._getters[name] = self._read_exact[COMMON_CFG_OFFSETS[name]] = lambda: value(self, original)

    after(patch, CommonCfg, "__init__", install)


def add_structure(patch: pytest.MonkeyPatch, kind: CfgType, offset: int, length: int, tail: bytes = b"") -> None:
    """One more virtio capability in BAR 4, behind the others."""
    body = bytes([kind, 4, 0, 0, 0]) + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + tail
    after(patch, VirtioPci, "_add_capabilities", lambda self, *_: self.add_capability(vendor_capability(body)))


def write_multiple(patch: pytest.MonkeyPatch) -> None:
    """A server that offers it, as ``--write-multiple`` does."""
    around(
        patch, Server, "__init__", lambda original, self, function, **_: original(self, function, write_multiple=True)
    )


def in_order(patch: pytest.MonkeyPatch) -> None:
    """Ours uses buffers in order where a device does nothing at the same time."""
    offer(patch, Feature.IN_ORDER.mask)


def admin_queue(patch: pytest.MonkeyPatch) -> None:
    """One administration queue, by the registers."""
    offer(patch, Feature.ADMIN_VQ.mask)
    answer_register(patch, "admin_queue_index", lambda cfg, _original: len(cfg.transport.device.queues))
    answer_register(patch, "admin_queue_num", lambda _cfg, _original: 1)


def sr_iov(patch: pytest.MonkeyPatch) -> None:
    """The extended capability, and nothing behind it."""
    offer(patch, Feature.SR_IOV.mask)
    after(patch, VirtioPci, "__init__", lambda self, *_: self.config.define(0x100, b"\x10\x00\x01\x00"))


def shared_memory(patch: pytest.MonkeyPatch) -> None:
    """A region of 16 bytes."""
    add_structure(patch, CfgType.SHARED_MEMORY, 0x3FF0, 16, bytes(8))


def vendor_data(patch: pytest.MonkeyPatch) -> None:
    """Eight bytes of another vendor."""
    body = bytes([CfgType.VENDOR, 0x34, 0x12, 0, 0])
    after(patch, VirtioPci, "_add_capabilities", lambda self, *_: self.add_capability(vendor_capability(body)))


def suspend(patch: pytest.MonkeyPatch) -> None:
    """A device that stops its queues, and says so."""

    def write(original: Any, self: Transport, value: int) -> Any:
        if not value & Status.SUSPEND:
            return original(self, value)
        if self._status & Status.DRIVER_OK:
            self.pause("suspended")
            self._status = self._status & ~Status.DRIVER_OK | Status.SUSPEND
        return None

    def reset(self: Transport) -> None:
        self.resume("suspended")

    offer(patch, Feature.SUSPEND.mask)
    around(patch, Transport, "write_status", write)
    after(patch, Transport, "reset", reset)


class PackedRing(SplitRing):
    """A packed ring without event suppression, put in the place of `SplitRing`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.next, self.wrap = 0, True
        self.used, self.used_wrap = 0, True
        self.found: list[tuple[int, int, int, int]] = []
        self.counts: dict[int, int] = {}

    def _at(self, slot: int) -> tuple[int, int, int, int]:
        return DESC.unpack_from(self.desc_bytes, DESC.size * (slot % self.size))

    def has_available(self) -> bool:
        flags = self._at(self.next)[3]
        return bool(flags & AVAIL) == self.wrap and bool(flags & USED) != self.wrap

    def pop(self, limit: int) -> list[Chain]:
        chains = []
        while len(chains) < limit and self.has_available():
            self.found, slot = [self._at(self.next)], self.next + 1
            while self.found[-1][3] & DescFlags.NEXT:
                self.found.append(self._at(slot))
                slot += 1
            head = self.buffer_id()
            self.counts[head] = len(self.found)
            chains.append(self._chain(head))
            self.in_flight[head] = chains[-1]
            if slot >= self.size:
                slot, self.wrap = slot - self.size, not self.wrap
            self.next = slot
        return chains

    def buffer_id(self) -> int:
        return self.found[-1][2]

    def _descriptors(self, _head: int) -> list[tuple[int, int, int, int]]:
        return [(address, length, flags, 0) for address, length, _id, flags in self.found]

    def store_used(self, count: int | None = None) -> list[tuple[int, int]]:
        shown, self._pushed = self._pushed, []
        for chain, written in shown:
            flags = (AVAIL | USED) * self.used_wrap
            address = self._at(self.used)[0]
            DESC.pack_into(self.desc_bytes, DESC.size * self.used, address, written, chain.head, flags)
            self.move_on(self.counts.pop(chain.head))
        return []

    def move_on(self, count: int) -> None:
        self.used += count
        if self.used >= self.size:
            self.used, self.used_wrap = self.used - self.size, not self.used_wrap

    def suppress_notifications(self) -> None:
        pass

    def request_notification(self) -> bool:
        return self.has_available()

    def interrupt_due(self) -> bool:
        return True


def packed(patch: pytest.MonkeyPatch, ring: type[PackedRing] = PackedRing) -> None:
    """A device whose queues are packed, whatever was negotiated, and then without INDIRECT_DESC and EVENT_IDX."""
    offer(patch, Feature.RING_PACKED.mask, without=Feature.INDIRECT_DESC.mask | Feature.EVENT_IDX.mask)
    patch.setattr(_queue, "SplitRing", ring)
    around(
        patch,
        Queue,
        "_area",
        lambda original, self, address, length, write: original(self, address, length, write=True),
    )


FAITHFUL: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "vfio-user/write-multi": (write_multiple, "rng"),
    "virtio14/RB2": (in_order, "rng"),
    "virtio14/RB3": (sr_iov, "rng"),
    "virtio14/CC9": (admin_queue, "rng"),
    "virtio14/SM1": (shared_memory, "rng"),
    "virtio14/VD1": (vendor_data, "rng"),
    "virtio14/SU1": (suspend, "rng"),
    "virtio14/SU2": (suspend, "rng"),
    "virtio14/SU3": (suspend, "rng"),
    "virtio14/PK1": (packed, "rng"),
    "virtio14/PK2": (packed, "blk"),
    "virtio14/PK3": (packed, "blk"),
    "virtio14/PK4": (packed, "blk"),
    "virtio14/PK5": (packed, "blk"),
}
"""By check: what makes the device, and of which type it is."""
