"""Devices that have, and rightly, what ours do not have: the checks of it must pass on them.

They are as simple as they can be, and only good for that.
"""

from collections.abc import Callable
from typing import Any

import pytest
from support.broken import after, around

from vfiouser_virtio.pci import vendor_capability
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, CfgType
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.vfio_user import Server
from vfiouser_virtio.virtio import Offer


def offer(patch: pytest.MonkeyPatch, bits: int, without: int = 0) -> None:
    """Offer other reserved features."""
    original = vars(Offer)["features"]
    ours = original.fget
    patch.setattr(Offer, "features", property(lambda self: (ours(self) | bits) & ~without))


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


def admin_queue(patch: pytest.MonkeyPatch) -> None:
    """One administration queue, by the registers."""
    offer(patch, Feature.ADMIN_VQ.mask)
    answer_register(patch, "admin_queue_index", lambda cfg, _original: len(cfg.core.queues))
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


FAITHFUL: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "vfio-user/write-multi": (write_multiple, "rng"),
    "virtio14/RB3": (sr_iov, "rng"),
    "virtio14/CC9": (admin_queue, "rng"),
    "virtio14/SM1": (shared_memory, "rng"),
    "virtio14/VD1": (vendor_data, "rng"),
}
"""By check: what makes the device, and of which type it is."""
