"""Names of the registers of a PCI device of an author's own, and of their fields, for the trace of its messages."""

from bisect import bisect_right
from collections.abc import Mapping

from vfiouser_virtio.pci.arrays import lay_out
from vfiouser_virtio.pci.device import PciDevice, bars_of
from vfiouser_virtio.pci.fields import BitField
from vfiouser_virtio.pci.register import Register
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import STD_HEADER_SIZEOF, TYPE0_HEADER
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.serving.region_accesses import region_accesses
from vfiouser_virtio.vfio_user import Message

_HEADER = offsets(TYPE0_HEADER)


class RegisterNames:
    """Names of what lies in the regions of a device of this class; a call says what is at an offset of a region."""

    def __init__(self, device_class: type[PciDevice]) -> None:
        self._fields: dict[tuple[int, int], tuple[int, Mapping[str, BitField]]] = {}
        self._found: dict[int, list[tuple[int, int, str]]] = {
            int(PciRegion.CONFIG): sorted((start, start + size, name) for name, (start, size) in _HEADER.items())
        }
        for index, (_, declared) in bars_of(device_class).items():
            laid_out = [part for name, each in declared for part in lay_out(name, each)]
            self._found[index] = sorted((offset, offset + part.size, path) for offset, part, path in laid_out)
            self._fields |= {
                (index, offset): (part.size, fields)
                for offset, part, _ in laid_out
                if isinstance(part, Register) and (fields := type(part).fields())
            }

    def __call__(self, region: int, offset: int) -> str:
        """``control``, ``address+4``, or nothing where nothing has a name."""
        start, name = self._at(region, offset)
        return name if not name or offset == start else f"{name}+{offset - start:#x}"

    def fields(self, region: int, offset: int, data: bytes) -> dict[str, int]:
        """The fields that lie in these bytes by name, and as ``reserved`` the bits of none of them that are set.

        Nothing where there is no register with fields, or less or more than one is accessed.
        """
        start, _ = self._at(region, offset)
        size, fields = self._fields.get((region, start), (0, {}))
        first, count = 8 * (offset - start), 8 * len(data)
        if not fields or offset + len(data) > start + size:
            return {}
        value = int.from_bytes(data, "little") << first
        whole = {name: each for name, each in fields.items() if first <= each.low and each.high < first + count}
        rest = value & ~sum(each.mask for each in fields.values())
        return {name: each.of(value) for name, each in whole.items()} | ({"reserved": rest} if rest else {})

    def _at(self, region: int, offset: int) -> tuple[int, str]:
        """Where what lies there begins, and its name; no name where there is nothing."""
        if region == PciRegion.CONFIG and offset >= STD_HEADER_SIZEOF:
            return 0, ""
        parts = self._found.get(region, [])
        number = bisect_right(parts, (offset, 1 << 64, "")) - 1
        if number < 0 or offset >= parts[number][1]:
            return 0, ""
        start, _, name = parts[number]
        return start, name


class FieldWords:
    """Fields in the accesses of a message, in words; the same interface as `FeatureWords`."""

    def __init__(self, names: RegisterNames) -> None:
        self._names = names

    def names(self, message: Message) -> list[str]:
        """For each access of a register with fields: ``enable=1 mode=2``, those that are not 0."""
        said = []
        for access in region_accesses(message):
            fields = self._names.fields(*access)
            words = [f"{name}={_number(value)}" for name, value in fields.items() if value]
            if words:
                said.append(" ".join(words))
        return said


def _number(value: int) -> str:
    return f"{value:#x}" if value > 9 else str(value)
