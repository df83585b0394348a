"""Virtio device ids (virtio 1.4, 5), by the names of linux/virtio_ids.h, and the numbers PCI derives from them."""

from enum import IntEnum


class DeviceId(IntEnum):
    """``VIRTIO_ID_*``."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    IOMEM = 6
    RPMSG = 7
    SCSI = 8
    P9 = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    MEMORY_BALLOON = 13
    GPU = 16
    CLOCK = 17
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    SIGNAL_DIST = 21
    PSTORE = 22
    IOMMU = 23
    MEM = 24
    SOUND = 25
    FS = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SEC_MOD = 33
    I2C_ADAPTER = 34
    WATCHDOG = 35
    CAN = 36
    DMABUF = 37
    PARAM_SERV = 38
    AUDIO_POLICY = 39
    BT = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB = 49


# PCI device ids are 0x1040 + virtio id, up to 0x107f (4.1.2): ids 1 to 63.
PCI_DEVICE_ID_BASE = 0x1040
MAX_PCI_DEVICE_ID = 63
