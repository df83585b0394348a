"""Registers of a PCI device of an author's own, and the numbers that its source names, as the fuzzer knows them.

::

    class Chip(PciDevice): …   ─▶  spots    name, BAR, offset, size, bits of each field
    JOB = struct.Struct("<QI") ─▶  layouts  sizes of the fields of what lies in memory: (8, 4)
    MAX_JOBS = 256, 0x5348     ─▶  words    numbers that mean something to it
"""

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import construct

from vfiouser_virtio.pci import BarMemory, PciDevice, Register
from vfiouser_virtio.pci.bar_part import BarPart
from vfiouser_virtio.protocols.codec import offsets

MOST_WORDS = 512
MOST_LAYOUTS = 64
_MOST_FIELDS = 64


@dataclass(frozen=True, slots=True)
class Spot:
    """Modelled part of a BAR."""

    name: str
    region: int
    offset: int
    size: int
    fields: tuple[int, ...] = ()
    """The bits of each field."""
    plain: bool = False
    """What is stored there can be read without an effect: a reset must bring its power-on value back."""
    memory: bool = False


@dataclass(frozen=True, slots=True)
class RegisterMap:
    """Registers of one device, and the dictionary for them."""

    spots: Mapping[str, Spot]
    sizes: Mapping[int, int]
    """Bytes of each BAR."""
    words: tuple[int, ...] = ()
    layouts: tuple[tuple[int, ...], ...] = ()
    """Sizes, in bytes, of the fields of structures that the device's file declares."""

    @staticmethod
    def of(device: PciDevice) -> "RegisterMap":
        """That of a device: all that it has declared, and what its module names."""
        spots = {part.name: _spot(index, part) for index, (_, space) in device.bars.items() for part in space.parts}
        sizes = {index: declared.size for index, (declared, _) in device.bars.items()}
        words, layouts = _named_by(type(device))
        return RegisterMap(spots, sizes, words, layouts)


def _spot(region: int, part: BarPart) -> Spot:
    if isinstance(part, Register):
        fields = tuple(field.mask for field in type(part).fields().values())
        plain = part.reads_plainly and not part.sticky
        return Spot(part.name, region, part.offset, part.size, fields, plain=plain)
    memory = isinstance(part, BarMemory)
    plain = isinstance(part, BarMemory) and not part.sticky
    return Spot(part.name, region, part.offset, part.size, plain=plain, memory=memory)


def _named_by(device_class: type[PciDevice]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Numbers and layouts that the modules of a class and of those that it extends name."""
    words: dict[int, None] = {}
    layouts: dict[tuple[int, ...], None] = {}
    for module in _modules(device_class):
        for value in list(module.values()):
            if isinstance(value, int):
                words[int(value)] = None
            elif isinstance(value, struct.Struct | construct.Construct):
                layouts[_sizes(value)] = None
            elif isinstance(value, FunctionType) and value.__globals__ is module:
                words |= dict.fromkeys(_constants(value.__code__))
            elif isinstance(value, type) and value.__module__ == module.get("__name__"):
                for method in vars(value).values():
                    if isinstance(method, FunctionType):
                        words |= dict.fromkeys(_constants(method.__code__))
    usable = [word for word in words if 0 <= word < 1 << 64]
    return tuple(usable[:MOST_WORDS]), tuple(each for each in list(layouts)[:MOST_LAYOUTS] if each)


def _modules(device_class: type[PciDevice]) -> Iterator[dict[str, Any]]:
    seen = set[int]()
    for each in device_class.__mro__:
        if each.__module__.startswith("vfiouser_virtio.pci") or each is object:
            continue
        for method in vars(each).values():
            if isinstance(method, FunctionType) and id(method.__globals__) not in seen:
                seen.add(id(method.__globals__))
                yield method.__globals__


def _constants(code: CodeType) -> Iterator[int]:
    for each in code.co_consts:
        if isinstance(each, int):
            yield int(each)
        elif isinstance(each, CodeType):
            yield from _constants(each)
        elif isinstance(each, tuple | frozenset):
            yield from (int(one) for one in each if isinstance(one, int))


def _sizes(layout: "struct.Struct | construct.Construct[Any, Any]") -> tuple[int, ...]:
    """Sizes of the fields; none for a structure that is not flat."""
    if isinstance(layout, struct.Struct):
        found: list[int] = []
        for count, letter in re.findall(r"(\d*)([xcbB?hHiIlLqQnNefdsp])", layout.format):
            size = struct.calcsize(f"<{letter}") if letter not in "nN" else 8
            found += [int(count or 1)] if letter in "sp" else [size] * min(int(count or 1), _MOST_FIELDS)
        return tuple(found[:_MOST_FIELDS])
    try:
        return tuple(size for _, size in offsets(layout).values())[:_MOST_FIELDS]
    except (TypeError, construct.ConstructError):
        return ()
