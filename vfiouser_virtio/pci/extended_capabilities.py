"""Extended capabilities (PCIe 4.0 §7.6.3) of PCI Express functions: a list from 0x100 of config space on."""

from dataclasses import dataclass

from vfiouser_virtio.pci.config_space import ConfigSpace, OnRead, OnWrite
from vfiouser_virtio.protocols.pci import (
    CFG_SPACE_SIZE,
    DSN_CAP,
    EXT_CAP_HEADER,
    EXT_CAP_NEXT_SHIFT,
    EXT_CAP_VERSION_SHIFT,
    EXT_VNDR_CAP_HEADER,
    ExtCapId,
)

_HEADER_SIZE = EXT_CAP_HEADER.sizeof()


@dataclass(frozen=True, slots=True)
class ExtendedCapability:
    """Element of the list: ``data`` is the whole capability, whose first four bytes (header) are filled in.

    ``writable``, ``write_1_to_clear`` and the hooks are those of `Capability`, and count from its first byte.
    """

    id: int
    data: bytes
    version: int = 1
    writable: bytes = b""
    write_1_to_clear: bytes = b""
    on_read: OnRead | None = None
    on_write: OnWrite | None = None

    def __post_init__(self) -> None:
        if not 0 < self.id <= 0xFFFF or not 0 < self.version <= 0xF or len(self.data) < _HEADER_SIZE:
            raise ValueError(
                f"extended capability {self.id:#x} version {self.version:#x} of {len(self.data)} bytes: expected an "
                f"id of 16 bits, a version of 4, and at least {_HEADER_SIZE} bytes"
            )
        if any(self.writable[:_HEADER_SIZE]) or any(self.write_1_to_clear[:_HEADER_SIZE]):
            raise ValueError(f"extended capability {self.id:#x}: its header is read-only")


class ExtendedChain:
    """Lays extended capabilities out, in the order in which they are added, and links them."""

    def __init__(self, config: ConfigSpace) -> None:
        self._config = config
        self._last = 0
        self._free = CFG_SPACE_SIZE

    def add(self, capability: ExtendedCapability) -> int:
        """Append one and return its offset. Raises ValueError without room: in 256 bytes there is none."""
        config, offset, size = self._config, self._free, len(capability.data)
        if offset + size > config.size:
            raise ValueError(
                f"extended capability {capability.id:#x} of {size:#x} bytes at {offset:#x} does not fit into "
                f"config space of {config.size:#x}; PCI Express has config_size=4096"
            )
        header = EXT_CAP_HEADER.build({"header": capability.id | capability.version << EXT_CAP_VERSION_SHIFT})
        config.define(
            offset,
            header + capability.data[_HEADER_SIZE:],
            writable=capability.writable,
            write_1_to_clear=capability.write_1_to_clear,
        )
        if capability.on_read is not None or capability.on_write is not None:
            config.hook(offset, size, on_read=capability.on_read, on_write=capability.on_write)
        if self._last:
            config.define_bits(self._last, (offset << EXT_CAP_NEXT_SHIFT).to_bytes(_HEADER_SIZE, "little"))
        self._last = offset
        self._free = offset + size + 3 & ~3
        return offset


def serial_number_capability(number: int) -> ExtendedCapability:
    """Device serial number (PCIe 4.0 §7.9.3), an EUI-64."""
    fields = {"header": 0, "sn_lo": number & 0xFFFF_FFFF, "sn_hi": number >> 32}
    return ExtendedCapability(ExtCapId.DSN, DSN_CAP.build(fields))


def extended_vendor_capability(
    vsec_id: int,
    body: bytes,
    *,
    revision: int = 1,
    writable: bytes = b"",
    on_read: OnRead | None = None,
    on_write: OnWrite | None = None,
) -> ExtendedCapability:
    """Vendor-specific extended capability (PCIe 4.0 §7.9.5): ``body`` follows two headers of 4 bytes each.

    ``vsec_id`` is the vendor's own number, of 16 bits; ``revision`` has 4.
    """
    length = EXT_VNDR_CAP_HEADER.sizeof() + len(body)
    if not 0 <= vsec_id <= 0xFFFF or not 0 <= revision <= 0xF or length > 0xFFF:
        raise ValueError(f"vendor-specific capability {vsec_id:#x} revision {revision:#x} of {length:#x} bytes")
    header = EXT_VNDR_CAP_HEADER.build({"header": 0, "vndr_header": vsec_id | revision << 16 | length << 20})
    return ExtendedCapability(ExtCapId.VNDR, header + body, writable=writable, on_read=on_read, on_write=on_write)
