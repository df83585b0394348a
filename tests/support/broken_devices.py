"""Broken virtio devices and functions (see `support.broken`)."""

import dataclasses
from typing import Any

from support.broken import breaks, breaks_by_fault
from support.faithful import answering, offering, with_capability, with_structure

from vfiouser_virtio.pci import Capability, Identity
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import TYPE0_HEADER, BaseAddress
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import NO_VECTOR, VENDOR_ID_2007, CfgType
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.transports.identity import identity
from vfiouser_virtio.transports.pci import MSIX_BAR
from vfiouser_virtio.vfio_device import Hold, RegionInfo
from vfiouser_virtio.virtio import Device, DeviceCore, Stop, Virtqueue

# ---- PCI ---------------------------------------------------------------------------------------------------------


@breaks("virtio14/PI1")
class ReportsAnotherBarSize(VirtioPci):
    def region_info(self, index: int) -> RegionInfo:
        found = super().region_info(index)
        return found._replace(size=2 * found.size) if index == 1 else found


@breaks("virtio14/PI1-msix")
class HasItsVectorsInIoSpace(VirtioPci):
    """As SPDK has its pending bits; the vectors still work."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.config.define_bits(offsets(TYPE0_HEADER)["base_address"][0] + 4 * MSIX_BAR, bytes([BaseAddress.SPACE_IO]))


class OtherIdentity(VirtioPci):
    """Some of its ids are others."""

    def __init__(self, device: Device, *, ids: Any, **named: Any) -> None:
        super().__init__(device, ids=self.change(identity(device.device_id, ids)), **named)

    def change(self, ids: Identity) -> Identity:
        raise NotImplementedError


@breaks("virtio14/PI2")
class HasTheVendorOf2007(OtherIdentity):
    def change(self, ids: Identity) -> Identity:
        return dataclasses.replace(ids, vendor=VENDOR_ID_2007)


@breaks("virtio14/PI3")
class HasRevision0(OtherIdentity):
    def change(self, ids: Identity) -> Identity:
        return dataclasses.replace(ids, revision=0)


@breaks("virtio14/PI4", logs="4 bytes at 0x24 of the common configuration: no whole field")
class TakesOnlyWholeAddresses(CommonCfg):
    @staticmethod
    def _half(position: int) -> None:
        return None


class OtherNotifyCapability(VirtioPci):
    """What it says of its notifications is not so."""

    def change(self, notify: bytearray) -> None:
        raise NotImplementedError

    def add_capability(self, capability: Capability) -> int:
        if capability.data[3] == CfgType.NOTIFY:
            data = bytearray(capability.data)
            self.change(data)
            capability = capability._replace(data=bytes(data))
        return super().add_capability(capability)


@breaks("virtio14/PC1")
class CountsTheCapabilityShort(VirtioPci):
    def _add_capabilities(self, vectors: int) -> None:
        super()._add_capabilities(vectors)
        self.config.store(self._cfg_cap + 2, b"\x10")


breaks("virtio14/CC1")(with_structure(CfgType.COMMON, 2, 64))
breaks("virtio14/NT1")(with_structure(CfgType.NOTIFY, 0x3001, 64, bytes([4, 0, 0, 0])))


@breaks("virtio14/NT2")
class MultipliesBySix(OtherNotifyCapability):
    def change(self, notify: bytearray) -> None:
        notify[16] = 6


@breaks("virtio14/NT3", device="console")
class HasRoomForOneQueue(OtherNotifyCapability):
    def change(self, notify: bytearray) -> None:
        notify[12:16] = bytes([4, 0, 0, 0])


breaks("virtio14/SM1")(with_structure(CfgType.SHARED_MEMORY, 0x3000, 0x4000, bytes(8)))  # it ends beyond the BAR
breaks("virtio14/VD1")(with_capability(bytes([CfgType.VENDOR, 0xF4, 0x1A, 0, 0])))  # it claims to be virtio's vendor


@breaks("virtio14/PA1")
class HasABlindWindow(VirtioPci):
    def _window(self) -> None:
        return None


breaks_by_fault("virtio14/DC1", "capability-missing:type=4", device="blk")

# ---- registers ---------------------------------------------------------------------------------------------------


@breaks("virtio14/CC2")
class LooksAtOneBitOfSelect(DeviceCore):
    def read_device_features(self, select: int) -> int:
        return super().read_device_features(select & 1)


@breaks("virtio14/CC3")
class ForgetsDriverFeatures(DeviceCore):
    def read_driver_features(self, select: int) -> int:
        return 0


breaks_by_fault("virtio14/CC4", "config-changes", device="blk")
breaks_by_fault("virtio14/CC5", "reset-stuck")


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


HasQueuesOfThree = answering(queue_size=lambda _cfg, original: original() or 3)
breaks("virtio14/CC8")(HasQueuesOfThree)


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


breaks("virtio14/CC9")(offering(Feature.ADMIN_VQ.mask))  # its registers say that it is queue 0


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


breaks_by_fault("virtio14/FB1", "features-extra:bit=44")
breaks_by_fault("virtio14/FB3", "features-refused:after=1")
breaks_by_fault("virtio14/RB1", "features-missing:bit=32")  # a legacy device


@breaks("virtio14/FB2")
class AcceptsWhatItHasNotOffered(DeviceCore):
    def _accept_features(self) -> bool:
        self.driver_features &= self.device_features
        return super()._accept_features()


@breaks("virtio14/RB1-accept")
class ServesDriversOfOld(DeviceCore):
    def _accept_features(self) -> bool:
        self.driver_features |= Feature.VERSION_1.mask
        return super()._accept_features()


breaks("virtio14/RB3")(offering(Feature.SR_IOV.mask))  # without the capability


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
class HasOneVector(CommonCfg):
    def _set_config_vector(self, value: int) -> None:
        self.config_vector = value if value < 1 else NO_VECTOR


@breaks("virtio14/MX2")
class HasAnyVector(CommonCfg):
    def _set_config_vector(self, value: int) -> None:
        self.config_vector = value


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
