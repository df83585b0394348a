"""Broken virtio devices and functions (see `support.broken`)."""

import dataclasses
import importlib
from typing import Any

import pytest
from support.broken import after, around, breaks
from support.faithful import add_structure, answer_register, offer

from vfiouser_virtio.pci import Bar, BarKind, PciFunction, vendor_capability
from vfiouser_virtio.pci.msix import Msix
from vfiouser_virtio.protocols.virtio.features import Feature, Status
from vfiouser_virtio.protocols.virtio.pci import NO_VECTOR, CfgType
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.vfio_device import RegionInfo
from vfiouser_virtio.virtio import Device, DeviceCore, Stop, Virtqueue
from vfiouser_virtio.virtio.suspend import Suspension

# By name: some of these packages export a function of the module's name.
identity_module: Any = importlib.import_module("vfiouser_virtio.transports.identity")
pci_module: Any = importlib.import_module("vfiouser_virtio.transports.pci")

# ---- PCI ---------------------------------------------------------------------------------------------------------


@breaks("virtio14/PI1")
def reports_another_bar_size(patch: pytest.MonkeyPatch) -> None:
    def info(original: Any, self: PciFunction, index: int) -> RegionInfo:
        found: RegionInfo = original(self, index)
        return dataclasses.replace(found, size=2 * found.size) if index == 1 else found

    around(patch, PciFunction, "region_info", info)


@breaks("virtio14/PI1-msix")
def has_its_vectors_in_io_space(patch: pytest.MonkeyPatch) -> None:
    """As SPDK has its pending bits; the vectors still work."""

    def bar(original: Any, self: Msix) -> Bar:
        found: Bar = original(self)
        object.__setattr__(found, "kind", BarKind.IO)  # past its own checks: I/O BARs end at 256 bytes
        return found

    around(patch, Msix, "bar", bar)


@breaks("virtio14/PI2")
def has_the_vendor_of_2007(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(identity_module, "VENDOR_ID", 0x5000)


@breaks("virtio14/PI3")
def has_revision_0(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(identity_module, "_REVISION", 0)


@breaks("virtio14/PI4", logs="4 bytes at 0x24 of the common configuration: no whole field")
def takes_only_whole_addresses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CommonCfg, "_half", staticmethod(lambda _position: None))


def _change_capability(patch: pytest.MonkeyPatch, kind: CfgType, change: Any) -> None:
    """``change`` gets the bytes from cfg_type on."""

    def make(original: Any, body: bytes, **named: Any) -> Any:
        return original(change(body) if body[0] == kind else body, **named)

    around(patch, pci_module, "vendor_capability", make)


@breaks("virtio14/PC1")
def counts_the_capability_short(patch: pytest.MonkeyPatch) -> None:
    after(patch, VirtioPci, "_add_capabilities", lambda self, *_: self.config.store(self._cfg_cap + 2, b"\x10"))


@breaks("virtio14/CC1")
def has_an_odd_common_cfg(patch: pytest.MonkeyPatch) -> None:
    add_structure(patch, CfgType.COMMON, 2, 64)


@breaks("virtio14/NT1")
def has_an_odd_notify_cfg(patch: pytest.MonkeyPatch) -> None:
    add_structure(patch, CfgType.NOTIFY, 0x3001, 64, bytes([4, 0, 0, 0]))


@breaks("virtio14/NT2")
def multiplies_by_six(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pci_module, "NOTIFY_MULTIPLIER", 6)


@breaks("virtio14/NT3", device="console")
def has_room_for_one_queue(patch: pytest.MonkeyPatch) -> None:
    _change_capability(patch, CfgType.NOTIFY, lambda body: body[:9] + bytes([4, 0, 0, 0]) + body[13:])


@breaks("virtio14/SM1")
def shares_memory_beyond_the_bar(patch: pytest.MonkeyPatch) -> None:
    add_structure(patch, CfgType.SHARED_MEMORY, 0x3000, 0x4000, bytes(8))


@breaks("virtio14/VD1")
def claims_to_be_the_vendor(patch: pytest.MonkeyPatch) -> None:
    body = bytes([CfgType.VENDOR, 0xF4, 0x1A, 0, 0])
    after(patch, VirtioPci, "_add_capabilities", lambda self, *_: self.add_capability(vendor_capability(body)))


@breaks("virtio14/PA1")
def has_a_blind_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VirtioPci, "_window", lambda _self: None)


@breaks("virtio14/DC1", device="blk")
def hides_its_configuration(patch: pytest.MonkeyPatch) -> None:
    def add(original: Any, self: VirtioPci, capability: Any) -> int:
        return 0 if capability.data[3] == CfgType.DEVICE else original(self, capability)

    around(patch, VirtioPci, "add_capability", add)


# ---- registers ---------------------------------------------------------------------------------------------------


@breaks("virtio14/CC2")
def looks_at_one_bit_of_select(patch: pytest.MonkeyPatch) -> None:
    around(patch, DeviceCore, "read_device_features", lambda original, self, select: original(self, select & 1))


@breaks("virtio14/CC3")
def forgets_driver_features(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceCore, "read_driver_features", lambda _self, _select: 0)


@breaks("virtio14/CC4", device="blk")
def changes_silently(patch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def read(original: Any, self: DeviceCore, offset: int, count: int) -> bytes:
        reads.append(offset)
        data: bytes = original(self, offset, count)
        return bytes([len(reads) & 0xFF]) + data[1:]

    around(patch, DeviceCore, "read_config", read)


@breaks("virtio14/CC5")
def is_never_reset(patch: pytest.MonkeyPatch) -> None:
    def write(original: Any, self: DeviceCore, value: int) -> Any:
        return original(self, value) if value else None

    around(patch, DeviceCore, "write_status", write)


@breaks("virtio14/CC6")
def keeps_queues_enabled(patch: pytest.MonkeyPatch) -> None:
    def reset(original: Any, self: Virtqueue) -> None:
        enabled = self.enabled
        original(self)
        self.enabled = enabled

    around(patch, Virtqueue, "reset", reset)


@breaks("virtio14/CC7")
def resets_queues_for_ever(patch: pytest.MonkeyPatch) -> None:
    after(patch, CommonCfg, "_set_queue_reset", lambda self, _value: self._queues_resetting.add(self._queue_select))


@breaks("virtio14/CC8")
def has_queues_of_three(patch: pytest.MonkeyPatch) -> None:
    answer_register(patch, "queue_size", lambda _cfg, original: original() or 3)


@breaks("virtio14/CC8-reset")
def keeps_the_queue_size(patch: pytest.MonkeyPatch) -> None:
    def reset(original: Any, self: Virtqueue) -> None:
        size = self.size
        original(self)
        self.size = size

    around(patch, Virtqueue, "reset", reset)


@breaks("virtio14/CC8-split")
def takes_any_queue_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Virtqueue, "allows", lambda _self, _size: True)


@breaks("virtio14/CC9")
def has_admin_queue_0(patch: pytest.MonkeyPatch) -> None:
    offer(patch, Feature.ADMIN_VQ.mask)


# ---- initialisation ----------------------------------------------------------------------------------------------


@breaks("virtio14/ST1")
def starts_early(patch: pytest.MonkeyPatch) -> None:
    def written(self: DeviceCore, value: int) -> None:
        if value & Status.FEATURES_OK:
            self._task.start()
            self.start(Stop.NOT_DRIVER_OK)

    after(patch, DeviceCore, "write_status", written)


@breaks("virtio14/ST2", logs="broke virtio.* names descriptor 0xffff of 0x10")
def suffers_in_silence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VirtioPci, "config_interrupt", lambda _self: None)


@breaks("virtio14/ST2-sets")
def takes_errors_lightly(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceCore, "needs_reset", lambda _self, _error: None)


@breaks("virtio14/FB1")
def offers_bit_44(patch: pytest.MonkeyPatch) -> None:
    offer(patch, 1 << 44)


@breaks("virtio14/FB2")
def accepts_what_it_has_not_offered(patch: pytest.MonkeyPatch) -> None:
    def accept(original: Any, self: DeviceCore) -> bool:
        self.driver_features &= self.device_features
        return bool(original(self))

    around(patch, DeviceCore, "_accept_features", accept)


@breaks("virtio14/FB3")
def negotiates_once(patch: pytest.MonkeyPatch) -> None:
    times: list[Device] = []

    def features_ok(_original: Any, self: Device) -> bool:
        times.append(self)
        return len(times) == 1

    around(patch, Device, "features_ok", features_ok)


@breaks("virtio14/RB1")
def is_a_legacy_device(patch: pytest.MonkeyPatch) -> None:
    offer(patch, 0, without=Feature.VERSION_1.mask)


@breaks("virtio14/RB1-accept")
def serves_drivers_of_old(patch: pytest.MonkeyPatch) -> None:
    def accept(original: Any, self: DeviceCore) -> bool:
        self.driver_features |= Feature.VERSION_1.mask
        return bool(original(self))

    around(patch, DeviceCore, "_accept_features", accept)


@breaks("virtio14/RB3")
def offers_sr_iov(patch: pytest.MonkeyPatch) -> None:
    offer(patch, Feature.SR_IOV.mask)


@breaks("virtio14/RS1")
def is_too_busy_for_a_reset(patch: pytest.MonkeyPatch) -> None:
    def write(original: Any, self: DeviceCore, value: int) -> Any:
        return original(self, value) if value or not self._status & Status.DRIVER_OK else None

    around(patch, DeviceCore, "write_status", write)


@breaks("virtio14/RS2")
def goes_on_after_a_reset(patch: pytest.MonkeyPatch) -> None:
    def reset(_original: Any, self: DeviceCore) -> None:
        self._status = self.driver_features = 0

    around(patch, DeviceCore, "reset", reset)


@breaks("virtio14/CF1", device="blk")
def shows_its_configuration_late(patch: pytest.MonkeyPatch) -> None:
    def read(original: Any, self: DeviceCore, offset: int, count: int) -> bytes:
        return bytes(original(self, offset, count)) if self._status & Status.FEATURES_OK else bytes(count)

    around(patch, DeviceCore, "read_config", read)


# ---- interrupts --------------------------------------------------------------------------------------------------


@breaks("virtio14/IS1")
def keeps_isr(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(VirtioPci, "_read_isr", lambda self: bytes([self._isr]))


@breaks("virtio14/IS2", logs="broke virtio.* names descriptor 0xffff of 0x10")
def forgets_isr_with_msix(patch: pytest.MonkeyPatch) -> None:
    def forget(self: VirtioPci) -> None:
        if self.msix_enabled:
            self._isr = 0

    after(patch, VirtioPci, "config_interrupt", forget)


@breaks("virtio14/IS3")
def forgets_interrupt_status(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PciFunction, "set_intx", lambda self, level: self.intx.set_level(level))


@breaks("virtio14/MX1")
def has_one_vector(patch: pytest.MonkeyPatch) -> None:
    def write(self: CommonCfg, value: int) -> None:
        self.config_vector = value if value < 1 else NO_VECTOR

    patch.setattr(CommonCfg, "_set_config_vector", write)


@breaks("virtio14/MX2")
def has_any_vector(patch: pytest.MonkeyPatch) -> None:
    def write(self: CommonCfg, value: int) -> None:
        self.config_vector = value

    patch.setattr(CommonCfg, "_set_config_vector", write)


@breaks("virtio14/MX3")
def fires_vector_0_instead(patch: pytest.MonkeyPatch) -> None:
    def interrupt(self: VirtioPci, index: int) -> None:
        vector = self._common.queue_vectors[index]
        self.raise_msix(0 if vector == NO_VECTOR else vector)

    patch.setattr(VirtioPci, "queue_interrupt", interrupt)


# ---- suspend -----------------------------------------------------------------------------------------------------


@breaks("virtio14/SU1", suspend=True)
def keeps_suspend_as_it_comes(patch: pytest.MonkeyPatch) -> None:
    def keep(self: DeviceCore, value: int) -> None:
        self._status |= value & Status.SUSPEND

    after(patch, DeviceCore, "write_status", keep)


@breaks("virtio14/SU2", suspend=True)
def works_in_its_sleep(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Suspension, "begin", lambda self: self._suspended())


@breaks("virtio14/SU3", suspend=True)
def does_not_wake_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceCore, "_resume", lambda _self: None)
