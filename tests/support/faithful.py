"""Devices that have, and rightly, what ours do not have: the checks of it must pass on them.

They are as simple as they can be, and only good for that.
"""

from collections.abc import Callable
from typing import Any

from support.broken import Make, made_with

from vfiouser_virtio.pci import vendor_capability
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, CfgType
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.virtio import DeviceCore


def offering(bits: int, without: int = 0) -> type[DeviceCore]:
    """A core that offers other reserved features."""

    class Offering(DeviceCore):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.device_features = (self.device_features | bits) & ~without

    return Offering


def answering(**registers: Callable[[CommonCfg, Callable[[], int]], int]) -> type[CommonCfg]:
    """A common configuration in which each of these registers reads as ``value(cfg, original)``."""

    class Answering(CommonCfg):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            for name, value in registers.items():
                self._answer(name, value, self._getters[name])

        def _answer(
            self, name: str, value: Callable[[CommonCfg, Callable[[], int]], int], original: Callable[[], int]
        ) -> None:
            self._getters[name] = self._read_exact[COMMON_CFG_OFFSETS[name]] = lambda: value(self, original)

    return Answering


def with_capability(*bodies: bytes) -> type[VirtioPci]:
    """A function with more vendor capabilities, behind its others; each body is all that follows cap_len."""

    class WithCapability(VirtioPci):
        def _add_capabilities(self, vectors: int) -> None:
            super()._add_capabilities(vectors)
            for body in bodies:
                self.add_capability(vendor_capability(body))

    return WithCapability


def with_structure(kind: CfgType, offset: int, length: int, tail: bytes = b"") -> type[VirtioPci]:
    """A function with one more virtio structure in BAR 4."""
    return with_capability(
        bytes([kind, 4, 0, 0, 0]) + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + tail
    )


class HasAnAdminQueue(VirtioPci):
    """By the registers."""

    common_cfg = answering(
        admin_queue_index=lambda cfg, _original: len(cfg.core.queues), admin_queue_num=lambda _cfg, _original: 1
    )


class HasVirtualFunctions(VirtioPci):
    """It has the extended capability of SR-IOV, and nothing behind it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.config.define(0x100, b"\x10\x00\x01\x00")


FAITHFUL: dict[str, Make] = {
    "virtio14/RB3": made_with(offering(Feature.SR_IOV.mask), HasVirtualFunctions),
    "virtio14/CC9": made_with(offering(Feature.ADMIN_VQ.mask), HasAnAdminQueue),
    "virtio14/SM1": with_structure(CfgType.SHARED_MEMORY, 0x3FF0, 16, bytes(8)),
    "virtio14/VD1": with_capability(bytes([CfgType.VENDOR, 0x34, 0x12, 0, 0])),  # eight bytes of another vendor
}
"""By check: what makes the device, of type rng."""
