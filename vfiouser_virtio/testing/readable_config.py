"""Device-specific configuration of an unknown device type, of which less may be there than is announced."""

from vfiouser_virtio.guest.pci_structures import VirtioStructure
from vfiouser_virtio.vfio_user import Client, RemoteError

_PIECE = 4


async def readable_config(client: Client, device: VirtioStructure, size: int) -> bytes:
    """The first ``size`` bytes, or those before the first access that is refused.

    A capability may announce more than there is (virtio 1.4, 4.1.4): SPDK does 4 KiB for the 36 bytes of virtio-scsi,
    and what lies behind them cannot be read.
    """
    size = min(size, device.length)
    try:
        return await client.region_read(device.bar, device.offset, size)
    except RemoteError:
        data = b""
    for at in range(0, size, _PIECE):
        try:
            data += await client.region_read(device.bar, device.offset + at, min(_PIECE, size - at))
        except RemoteError:
            break
    return data
