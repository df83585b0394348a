"""Expansion ROM (PCI Local Bus 3.0 §6.3): code for a machine's firmware, which the client reads as a region of its own.

::

    0x000  55 AA, an image (§6.3.1.1); its word at 0x18 is where its data structure "PCIR" begins
    ...    more images, each a multiple of 512 bytes; FF up to the next power of two
"""

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import (
    ROM_ADDRESS_ENABLE,
    ROM_PCIR,
    ROM_PCIR_POINTER,
    ROM_SIGNATURE,
    TYPE0_HEADER,
)

_REGISTER, _REGISTER_SIZE = offsets(TYPE0_HEADER)["rom_address"]
_SMALLEST = 2 << 10
MOST_ROM = 16 << 20
"""Bytes that the register can express (§6.2.5.2)."""


class OptionRom:
    """ROM of a function. Whether its register enables it is not looked at: a client reads it when it likes."""

    def __init__(self, image: bytes, identity: Identity, config: ConfigSpace) -> None:
        """Raises ValueError for an image that firmware would pass over: it names what is wrong."""
        _check(image, identity)
        self.size = max(_SMALLEST, 1 << (len(image) - 1).bit_length())
        self._image = image.ljust(self.size, b"\xff")
        writable = (1 << 32) - self.size | ROM_ADDRESS_ENABLE
        config.define(_REGISTER, bytes(_REGISTER_SIZE), writable=writable.to_bytes(_REGISTER_SIZE, "little"))

    def read(self, offset: int, count: int) -> bytes:
        """What the client reads. Raises PeerError (EINVAL) outside of it."""
        if offset < 0 or offset + count > self.size:
            raise PeerError(f"access of {count} bytes at {offset:#x} is outside the ROM, of {self.size:#x} bytes")
        return self._image[offset : offset + count]


def _check(image: bytes, identity: Identity) -> None:
    if len(image) > MOST_ROM:
        raise ValueError(f"a ROM of {len(image):#x} bytes: there is room for {MOST_ROM:#x}")
    if image[:2] != ROM_SIGNATURE:
        raise ValueError(f"a ROM that begins with {image[:2].hex(' ')}, not with {ROM_SIGNATURE.hex(' ')}")
    at = int.from_bytes(image[ROM_PCIR_POINTER : ROM_PCIR_POINTER + 2], "little")
    found = image[at : at + ROM_PCIR.sizeof()]
    if len(found) < ROM_PCIR.sizeof() or found[:4] != b"PCIR":
        raise ValueError(f"a ROM without a PCI data structure at {at:#x}, which its word at 0x18 names")
    ids = ROM_PCIR.parse(found)
    if not ids.device_list and (ids.vendor_id, ids.device_id) != (identity.vendor, identity.device):
        raise ValueError(
            f"a ROM for {ids.vendor_id:04x}:{ids.device_id:04x}, while the function is "
            f"{identity.vendor:04x}:{identity.device:04x}: firmware would not run it"
        )
