"""Names of the registers of a PCI device of an author's own, for the trace of its messages."""

from bisect import bisect_right

from vfiouser_virtio.pci.arrays import lay_out
from vfiouser_virtio.pci.device import PciDevice, bars_of
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import STD_HEADER_SIZEOF, TYPE0_HEADER
from vfiouser_virtio.protocols.vfio_user import PciRegion

_HEADER = offsets(TYPE0_HEADER)


class RegisterNames:
    """Names of what lies in the regions of a device of this class; a call says what is at an offset of a region."""

    def __init__(self, device_class: type[PciDevice]) -> None:
        self._found: dict[int, list[tuple[int, int, str]]] = {
            int(PciRegion.CONFIG): sorted((start, start + size, name) for name, (start, size) in _HEADER.items())
        }
        for index, (_, declared) in bars_of(device_class).items():
            self._found[index] = sorted(
                (offset, offset + part.size, path)
                for name, each in declared
                for offset, part, path in lay_out(name, each)
            )

    def __call__(self, region: int, offset: int) -> str:
        """``control``, ``address+4``, or nothing where nothing has a name."""
        if region == PciRegion.CONFIG and offset >= STD_HEADER_SIZEOF:
            return ""
        parts = self._found.get(region, [])
        number = bisect_right(parts, (offset, 1 << 64, "")) - 1
        if number < 0 or offset >= parts[number][1]:
            return ""
        start, _, name = parts[number]
        return name if offset == start else f"{name}+{offset - start:#x}"
