"""Declaration of a virtio device type (virtio 1.4, 5): what devices, drivers and tools read, and keep no list of.

A type has one module beside this one, whose ``TYPE`` is its declaration; `device_types` lists them.

===================  ==============================================================================================
field                read by
===================  ==============================================================================================
config, features     the Python guest, ``probe``, ``conform``; config_pages: ``probe``
queues, more, first  the Python guest, ``probe``; the fuzzer
last, sets           likewise: the queue behind all others, and how many there are before it
requires             ``conform`` (feature bits that need another one); requires_all: that need several
pci_class            `transports.identity`
linux_modules        the initramfs of the Linux guest
exercise             ``conform`` and the fuzzer: one request that every device of the type answers
requests             the fuzzer: the shapes of all requests
===================  ==============================================================================================
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from vfiouser_virtio.protocols.codec import Schema

PCI_CLASS_OTHER = 0x00FF00
"""Class code of what has no class of its own: "unclassified, other" (pci_ids.h)."""


class Exercise(NamedTuple):
    """Request that leaves no trace (but for a line on a console) and may be repeated at any time."""

    name: str
    queue: int
    readable: bytes
    """What the device is to read."""
    writable: int
    """Bytes that the device may write."""
    complaint: Callable[[bytes, int], str]
    """From the written bytes and used.len, what is wrong with the answer; empty if nothing is."""
    last_writable: int = 0
    """How many of the writable bytes, at their end, have a descriptor of their own as Linux's driver cuts requests."""


def no_complaint(_data: bytes, _used: int) -> str:
    """`Exercise.complaint` of a request whose answer says nothing."""
    return ""


class RequestShape(NamedTuple):
    """Layout of one kind of request: a header, an array, bytes; and the room that the device writes to."""

    queues: Sequence[int]
    """Indexes of the queues that such a request goes to."""
    header: "Schema | None" = None
    """A flat structure at the beginning of the readable part."""
    usual: Mapping[str, Sequence[int]] = {}
    """Values that the fields of ``header`` and ``entry`` mostly have, by name; other fields may have any."""
    entry: "Schema | None" = None
    """A flat structure, of which there is an array after the header."""
    counts: Sequence[int] = (0,)
    """Usual numbers of entries."""
    payload: Sequence[int] = (0,)
    """Usual numbers of bytes after that."""
    writable: Sequence[int] = (0,)
    """Usual numbers of writable bytes."""
    weight: int = 1
    """How often this shape is taken, in proportion to the others of its type."""


class ConfigPage(NamedTuple):
    """Configuration after a driver has written to its selectors, as input devices have it (5.8.4)."""

    name: str
    select: Mapping[str, int]
    """Fields to write, and their values."""
    text: Callable[[Mapping[str, bytes]], str]
    """All fields, as they are then, in words; empty where the device has no such page."""


class QueueSets(NamedTuple):
    """Number of times that a device has the queues of `DeviceType.more`."""

    field: str
    """The configuration field that says it."""
    features: tuple[int, ...]
    """Feature bits: with none of them accepted there is one set, whatever the field says."""

    def number(self, features: int, field: int) -> int:
        """How many, with these features and that value of the field."""
        return field if any(features >> bit & 1 for bit in self.features) else 1


class DeviceType(NamedTuple):
    """Declaration of a type. Queues 0, 1, … have the names of ``queues``; then come those of ``more``, numbered.

    The number goes on from ``first``: the specification counts requestq1 … requestqN, but port0 … portN. A queue that
    comes after all of them is ``last``; its index is known to who knows how many sets of ``more`` there are.
    """

    name: str
    """What users call the type, and the name of its modules in `devices` and `guest.drivers`."""
    config: "Schema | None" = None
    """The device-specific configuration; None for a type that has none."""
    features: type[IntEnum] | None = None
    """Feature bits of the type, by number."""
    queues: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    first: int = 1
    last: str = ""
    device_id: int = 0
    """Virtio device id; 0 in declarations of users, whose key in `device_types.DEVICE_TYPES` says it."""
    config_pages: tuple[ConfigPage, ...] = ()
    """Pages of the configuration, instead of which its fields say nothing."""
    requires: Mapping[int, tuple[int, ...]] = {}
    """Feature bit to bits of which one must be offered with it."""
    requires_all: Mapping[int, tuple[int, ...]] = {}
    """Feature bit to bits of which all must be offered with it."""
    sets: QueueSets | None = None
    """How many sets of ``more`` there are, for a type with a ``last`` queue."""
    device_fills: tuple[str, ...] = ()
    """Queues, by name or by stem in ``more``, whose buffers a device keeps until it has something to say."""
    queue_features: Mapping[str, int] = {}
    """Queues, by name or by stem in ``more``, that exist only with a feature bit."""
    takes_pages: bool = False
    """The guest gives memory to the device by its address; what it has given may read as zeros at any time."""
    pci_class: int = PCI_CLASS_OTHER
    """PCI class code, 24 bits."""
    qemu_pci_class: int | None = None
    """The class code of QEMU's own device of this type, where that is another one."""
    linux_modules: tuple[str, ...] = ()
    """Linux's driver, then the modules that programs need to use it, which the Linux guest loads as well."""
    exercise: Exercise | None = None
    requests: tuple[RequestShape, ...] = ()

    def queue_name(self, index: int, sets: int | None = None) -> str:
        """What the specification calls a queue; ``queue 7`` where it does not. ``sets``: of ``more``, if known."""
        if index < len(self.queues):
            return self.queues[index]
        if not self.more:
            return f"queue {index}"
        number, position = divmod(index - len(self.queues), len(self.more))
        if self.last and sets is not None and number >= sets:
            return self.last if index == self._last_index(sets) else f"queue {index}"
        return f"{self.more[position]}{number + self.first}"

    def queue_index(self, name: str, sets: int | None = None) -> int:
        """The other way round. Raises LookupError for a name that no queue of this type has."""
        if name in self.queues:
            return self.queues.index(name)
        if name == self.last and sets is not None:
            return self._last_index(sets)
        stem = name.rstrip("0123456789")
        number = name[len(stem) :]
        if stem in self.more and number and int(number) >= self.first:
            return len(self.queues) + (int(number) - self.first) * len(self.more) + self.more.index(stem)
        known = [*self.queues, *(f"{stem}{self.first}…" for stem in self.more), *filter(None, [self.last])]
        raise LookupError(f"{self.name}: no queue {name!r} among {', '.join(known) or 'none'}")

    def _last_index(self, sets: int) -> int:
        return len(self.queues) + sets * len(self.more)

    def keeps_buffers(self, index: int, features: int, sets: int | None = None) -> bool:
        """Whether a device may keep a buffer of this queue for as long as it likes, with the accepted ``features``.

        It may where the buffer waits for something to happen, and in a queue that does not exist.
        """
        if self.last and sets is not None and index > self._last_index(sets):
            return True
        name = self.queue_name(index, sets)
        key = name if index < len(self.queues) or name == self.last else name.rstrip("0123456789")
        needed = self.queue_features.get(key)
        return key in self.device_fills or (needed is not None and not features >> needed & 1)
