"""Identifiers, feature bits, PCI structures and rings against linux/virtio_*.h."""

import pytest
from support.uapi import defines, struct_layout, struct_size

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio import ids, pci, ring
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature

CONFIG, IDS, PCI, RING = "linux/virtio_config.h", "linux/virtio_ids.h", "linux/virtio_pci.h", "linux/virtio_ring.h"


def test_device_ids() -> None:
    linux = {name.removeprefix("VIRTIO_ID_"): number for name, number in defines(IDS).items()}
    linux["P9"] = linux.pop("9P")
    ours = {device.name: int(device) for device in ids.DeviceId}
    # What the headers have no name for yet.
    newer = {"SPI", "TEE", "CPU_BALLOON", "MEDIA", "USB", "RDMA", "CAMERA", "ISM", "GPIO", "DMABUF", "PARAM_SERV"}
    shared = ours.keys() & linux.keys()
    assert {name: ours[name] for name in shared} == {name: linux[name] for name in shared}
    assert ours.keys() - linux.keys() <= newer
    assert len(shared) > 30


@pytest.mark.parametrize("feature", Feature)
def test_feature_bits(feature: Feature) -> None:
    linux = defines(CONFIG) | defines(RING)
    names = {"INDIRECT_DESC": "VIRTIO_RING_F_INDIRECT_DESC", "EVENT_IDX": "VIRTIO_RING_F_EVENT_IDX"}
    name = names.get(feature.name, f"VIRTIO_F_{feature.name}")
    if feature in (Feature.SUSPEND, Feature.NOTIFICATION_DATA, Feature.NOTIF_CONFIG_DATA, Feature.ADMIN_VQ):
        assert linux.get(name, feature) == feature  # newer than many headers
    else:
        assert linux[name] == feature


def test_status_bits() -> None:
    linux = defines(CONFIG)
    for status in DeviceStatus:
        if status is not DeviceStatus.SUSPEND:  # newer than the headers
            assert linux[f"VIRTIO_CONFIG_S_{status.name}"] == status


def test_pci_capabilities() -> None:
    linux = defines(PCI)
    names = {"COMMON": "COMMON_CFG", "NOTIFY": "NOTIFY_CFG", "ISR": "ISR_CFG", "DEVICE": "DEVICE_CFG", "PCI": "PCI_CFG"}
    names |= {"SHARED_MEMORY": "SHARED_MEMORY_CFG", "VENDOR": "VENDOR_CFG"}
    for kind in pci.CfgType:
        assert linux.get(f"VIRTIO_PCI_CAP_{names[kind.name]}", kind) == kind
    assert linux["VIRTIO_MSI_NO_VECTOR"] == pci.NO_VECTOR
    assert linux["VIRTIO_PCI_ISR_CONFIG"] == pci.Isr.CONFIG
    layout = struct_layout(PCI, "virtio_pci_cap")
    assert offsets(pci.CAP) == {name: layout[name] for name in offsets(pci.CAP)}
    assert struct_size(PCI, "virtio_pci_notify_cap") == pci.NOTIFY_CAP.sizeof()
    assert struct_size(PCI, "virtio_pci_cfg_cap") == pci.CFG_CAP.sizeof()


def test_common_configuration() -> None:
    linux = defines(PCI)
    # Linux's names are older than the specification's, and it splits the 64-bit addresses.
    names = {
        "device_feature_select": "DFSELECT",
        "device_feature": "DF",
        "driver_feature_select": "GFSELECT",
        "driver_feature": "GF",
        "config_msix_vector": "MSIX",
        "num_queues": "NUMQ",
        "device_status": "STATUS",
        "config_generation": "CFGGENERATION",
        "queue_select": "Q_SELECT",
        "queue_size": "Q_SIZE",
        "queue_msix_vector": "Q_MSIX",
        "queue_enable": "Q_ENABLE",
        "queue_notify_off": "Q_NOFF",
        "queue_desc": "Q_DESCLO",
        "queue_driver": "Q_AVAILLO",
        "queue_device": "Q_USEDLO",
        "queue_notif_config_data": "Q_NDATA",
        "queue_reset": "Q_RESET",
        "admin_queue_index": "ADM_Q_IDX",
        "admin_queue_num": "ADM_Q_NUM",
    }
    for field, (offset, _) in pci.COMMON_CFG_OFFSETS.items():
        assert linux.get(f"VIRTIO_PCI_COMMON_{names[field]}", offset) == offset, field
    assert pci.COMMON_CFG_SIZE == 64
    plain = struct_layout(PCI, "virtio_pci_common_cfg")
    for field in ("device_feature", "num_queues", "device_status", "queue_size", "queue_enable"):
        assert pci.COMMON_CFG_OFFSETS[field] == plain[field]


def test_rings() -> None:
    linux = defines(RING)
    assert offsets(ring.DESC) == struct_layout(RING, "vring_desc")
    assert offsets(ring.USED_ELEM) == struct_layout(RING, "vring_used_elem")
    for flag in (ring.DescFlags.NEXT, ring.DescFlags.WRITE, ring.DescFlags.INDIRECT):
        assert linux[f"VRING_DESC_F_{flag.name}"] == flag
    assert linux["VRING_AVAIL_F_NO_INTERRUPT"] == ring.AvailFlags.NO_INTERRUPT
    assert linux["VRING_USED_F_NO_NOTIFY"] == ring.UsedFlags.NO_NOTIFY
    assert (linux["VRING_DESC_ALIGN_SIZE"], linux["VRING_AVAIL_ALIGN_SIZE"], linux["VRING_USED_ALIGN_SIZE"]) == (
        ring.DESC_ALIGN,
        ring.AVAIL_ALIGN,
        ring.USED_ALIGN,
    )


def test_packed_rings() -> None:
    linux = defines(RING)
    assert offsets(ring.PACKED_DESC) == struct_layout(RING, "vring_packed_desc")
    assert offsets(ring.PACKED_EVENT) == struct_layout(RING, "vring_packed_desc_event")
    for flag in (ring.DescFlags.AVAIL, ring.DescFlags.USED):
        assert 1 << linux[f"VRING_PACKED_DESC_F_{flag.name}"] == flag
    for event in ring.RingEventFlags:
        assert linux[f"VRING_PACKED_EVENT_FLAG_{event.name}"] == event
    assert 1 << linux["VRING_PACKED_EVENT_F_WRAP_CTR"] == ring.WRAP_COUNTER
