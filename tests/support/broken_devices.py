"""Broken virtio devices and functions (see `support.broken`)."""

import dataclasses
import importlib
from typing import Any

import pytest
from support.broken import around, breaks
from support.faithful import add_structure, answer_register, offer

from vfiouser_virtio.pci import Bar, BarKind, vendor_capability
from vfiouser_virtio.pci.msix import Msix
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import NO_VECTOR, CfgType
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.vfio_device import Hold, RegionInfo
from vfiouser_virtio.virtio import Device, DeviceCore, Stop, Virtqueue

# By name: some of these packages export a function of the module's name.
identity_module: Any = importlib.import_module("vfiouser_virtio.transports.identity")
pci_module: Any = importlib.import_module("vfiouser_virtio.transports.pci")

# ---- PCI ---------------------------------------------------------------------------------------------------------


@breaks("virtio14/PI1")
class ReportsAnotherBarSize(VirtioPci):
    def region_info(self, index: int) -> RegionInfo:
        found = super().region_info(index)
        return dataclasses.replace(found, size=2 * found.size) if index == 1 else found


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
class CountsTheCapabilityShort(VirtioPci):
    def _add_capabilities(self, vectors: int) -> None:
        super()._add_capabilities(vectors)
        self.config.store(self._cfg_cap + 2, b"\x10")


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
class ClaimsToBeTheVendor(VirtioPci):
    def _add_capabilities(self, vectors: int) -> None:
        super()._add_capabilities(vectors)
        self.add_capability(vendor_capability(bytes([CfgType.VENDOR, 0xF4, 0x1A, 0, 0])))


@breaks("virtio14/PA1")
class HasABlindWindow(VirtioPci):
    def _window(self) -> None:
        return None


@breaks("virtio14/DC1", device="blk")
class HidesItsConfiguration(VirtioPci):
    def add_capability(self, capability: Any) -> int:
        return 0 if capability.data[3] == CfgType.DEVICE else super().add_capability(capability)


# ---- registers ---------------------------------------------------------------------------------------------------


@breaks("virtio14/CC2")
class LooksAtOneBitOfSelect(DeviceCore):
    def read_device_features(self, select: int) -> int:
        return super().read_device_features(select & 1)


@breaks("virtio14/CC3")
class ForgetsDriverFeatures(DeviceCore):
    def read_driver_features(self, select: int) -> int:
        return 0


@breaks("virtio14/CC4", device="blk")
class ChangesSilently(DeviceCore):
    reads = 0

    def read_config(self, offset: int, count: int) -> bytes:
        self.reads += 1
        return bytes([self.reads & 0xFF]) + super().read_config(offset, count)[1:]


@breaks("virtio14/CC5")
class IsNeverReset(DeviceCore):
    def write_status(self, value: int) -> Hold | None:
        return super().write_status(value) if value else None


@breaks("virtio14/CC6")
class KeepsQueuesEnabled(Virtqueue):
    def clear(self) -> None:
        enabled = self.enabled
        super().clear()
        self.enabled = enabled


@breaks("virtio14/CC7")
class ResetsQueuesForEver(DeviceCore):
    def reset_queue(self, index: int) -> Hold:
        super().reset_queue(index)
        return Hold()


@breaks("virtio14/CC8")
def has_queues_of_three(patch: pytest.MonkeyPatch) -> None:
    answer_register(patch, "queue_size", lambda _cfg, original: original() or 3)


@breaks("virtio14/CC8-reset")
class KeepsTheQueueSize(Virtqueue):
    def reset(self) -> None:
        size = self.size
        super().reset()
        self.configure(size=size)


@breaks("virtio14/CC8-split")
class TakesAnyQueueSize(Virtqueue):
    def allows(self, size: int) -> bool:
        return True


@breaks("virtio14/CC9")
def has_admin_queue_0(patch: pytest.MonkeyPatch) -> None:
    offer(patch, Feature.ADMIN_VQ.mask)


# ---- initialisation ----------------------------------------------------------------------------------------------


@breaks("virtio14/ST1")
class StartsEarly(DeviceCore):
    def write_status(self, value: int) -> Hold | None:
        hold = super().write_status(value)
        if value & DeviceStatus.FEATURES_OK:
            self._task.start()
            self.start(Stop.NOT_DRIVER_OK)
        return hold


@breaks("virtio14/ST2", logs="broke virtio.* names descriptor 0xffff of 0x10")
class SuffersInSilence(VirtioPci):
    def config_interrupt(self) -> None:
        pass


@breaks("virtio14/ST2-sets")
class TakesErrorsLightly(DeviceCore):
    def needs_reset(self, error: Exception) -> None:
        pass


@breaks("virtio14/FB1")
def offers_bit_44(patch: pytest.MonkeyPatch) -> None:
    offer(patch, 1 << 44)


@breaks("virtio14/FB2")
class AcceptsWhatItHasNotOffered(DeviceCore):
    def _accept_features(self) -> bool:
        self.driver_features &= self.device_features
        return super()._accept_features()


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
class ServesDriversOfOld(DeviceCore):
    def _accept_features(self) -> bool:
        self.driver_features |= Feature.VERSION_1.mask
        return super()._accept_features()


@breaks("virtio14/RB3")
def offers_sr_iov(patch: pytest.MonkeyPatch) -> None:
    offer(patch, Feature.SR_IOV.mask)


@breaks("virtio14/RS1")
class IsTooBusyForAReset(DeviceCore):
    def write_status(self, value: int) -> Hold | None:
        return super().write_status(value) if value or not self.status & DeviceStatus.DRIVER_OK else None


@breaks("virtio14/RS2")
class GoesOnAfterAReset(DeviceCore):
    def reset(self) -> None:
        self._status = self.driver_features = 0


@breaks("virtio14/CF1", device="blk")
class ShowsItsConfigurationLate(DeviceCore):
    def read_config(self, offset: int, count: int) -> bytes:
        return super().read_config(offset, count) if self.status & DeviceStatus.FEATURES_OK else bytes(count)


# ---- interrupts --------------------------------------------------------------------------------------------------


@breaks("virtio14/IS1")
class KeepsIsr(VirtioPci):
    def _read_isr(self) -> bytes:
        return bytes([self._isr])


@breaks("virtio14/IS2", logs="broke virtio.* names descriptor 0xffff of 0x10")
class ForgetsIsrWithMsix(VirtioPci):
    def config_interrupt(self) -> None:
        super().config_interrupt()
        if self.msix_enabled:
            self._isr = 0


@breaks("virtio14/IS3")
class ForgetsInterruptStatus(VirtioPci):
    def set_intx(self, level: bool) -> None:
        self.intx.set_level(level)


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
class FiresVector0Instead(VirtioPci):
    def queue_interrupt(self, index: int) -> None:
        vector = self._common.queue_vectors[index]
        self.raise_msix(0 if vector == NO_VECTOR else vector)


# ---- suspend -----------------------------------------------------------------------------------------------------


@breaks("virtio14/SU1", suspend=True)
class KeepsSuspendAsItComes(DeviceCore):
    def write_status(self, value: int) -> Hold | None:
        hold = super().write_status(value)
        self._status |= value & DeviceStatus.SUSPEND
        return hold


@breaks("virtio14/SU2", suspend=True)
class WorksInItsSleep(DeviceCore):
    def write_status(self, value: int) -> Hold | None:
        if value & DeviceStatus.SUSPEND and self.running and not self.status & DeviceStatus.SUSPEND:
            self._suspended()
            return None
        return super().write_status(value)


@breaks("virtio14/SU3", suspend=True)
class DoesNotWakeUp(DeviceCore):
    def _resume(self) -> None:
        pass
