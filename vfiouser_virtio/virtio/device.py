"""Virtio device base class for authors: queues, features, configuration, and nothing below them.

::

    class Echo(Device):
        device_id = 63
        requestq = queue(max_size=64)           # order of declaration = queue index

        async def run(self) -> None:            # lives exactly from DRIVER_OK to reset
            async for chain in self.requestq:
                chain.writable.write(chain.readable.read())
                chain.complete()                # used ring, and an interrupt if one is due
"""

import logging
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, overload

from vfiouser_virtio.device_log import DeviceLog, id_in_making
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.protocols.record import Record
from vfiouser_virtio.protocols.virtio.ring import MAX_QUEUE_SIZE
from vfiouser_virtio.virtio.guest_ram import GuestRam
from vfiouser_virtio.virtio.queue import Queue

if TYPE_CHECKING:
    from vfiouser_virtio.virtio.shared_memory import SharedRegion


def queue(max_size: int = 128) -> "QueueDeclaration":
    """Declaration of a virtqueue in the body of a `Device`: each instance gets a `Queue` of its own.

    Raises AuthorError where ``max_size`` is no power of two from 1 to 32768 (virtio 1.4, 2.7).
    """
    return QueueDeclaration(_checked_size(max_size))


class QueueDeclaration:
    """Descriptor made by `queue`: the attribute of an instance is that instance's `Queue`."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.name = ""

    def __set_name__(self, owner: "type[Device]", name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: "type[Device]") -> "QueueDeclaration": ...

    @overload
    def __get__(self, instance: "Device", owner: "type[Device]") -> Queue: ...

    def __get__(self, instance: "Device | None", owner: "type[Device]") -> "Queue | QueueDeclaration":
        if instance is None:
            return self
        found = instance.__dict__.get(self.name)
        if not isinstance(found, Queue):
            raise _uninitialised(instance, self.name)
        return found


class Config:
    """Device-specific configuration (virtio 1.4, 2.5): the values of one schema, shown to the driver."""

    def __init__(self, record: Record | None) -> None:
        if not isinstance(record, Record | None):
            raise AuthorError(f"config={record!r} is no record: describe its fields with protocols.record.record()")
        self._record = record
        self.on_change: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        """Bytes; 0 where a device type has none."""
        return 0 if self._record is None else len(self._record.data)

    @property
    def layout(self) -> Mapping[str, tuple[int, int]]:
        """Name to (offset, size), in bytes, of each field."""
        return {} if self._record is None else self._record.offsets

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of all fields, in order; none where a device type has no configuration."""
        return () if self._record is None else tuple(self._record.offsets)

    def __getitem__(self, field: str) -> int | bytes:
        """A field's value: an integer, or bytes where it is no integer of 1, 2, 4 or 8 bytes. Raises KeyError."""
        if self._record is None:
            raise KeyError(field)
        return self._record[field]

    def update(self, **fields: int | bytes) -> None:
        """Change fields; the driver gets a new generation, and a configuration interrupt if it is running."""
        self.set(**fields)
        if self.on_change is not None:
            self.on_change()

    def set(self, **fields: int | bytes) -> None:
        """Change fields without telling the driver: for what it wrote itself, or before it runs."""
        if self._record is None:
            raise KeyError(f"no configuration, so no {', '.join(fields)}")
        for name, value in fields.items():
            self._record[name] = value

    def read(self, offset: int, count: int) -> bytes:
        """What the driver reads; beyond the end there are zeros."""
        data = b"" if self._record is None else bytes(self._record.data[offset : offset + count])
        return data.ljust(count, b"\0")

    def write(self, offset: int, data: bytes, allowed: frozenset[str]) -> list[str]:
        """What the driver writes: only whole fields that are ``allowed`` change; returns their names."""
        record = self._record
        if record is None:
            return []
        written = [name for name in record.fields_in(offset, len(data)) if name in allowed]
        for name in written:
            at, size = record.offsets[name]
            record.data[at : at + size] = data[at - offset : at - offset + size]
        return written


class Device:
    """Virtio device. Subclasses set `device_id`, declare queues, and write `run`.

    ``features`` are the device-type bits that this instance offers, as a mask; the transport adds the reserved ones.
    """

    device_id: ClassVar[int] = 0
    """Virtio device id, 1 to 63 (virtio 1.4, 5)."""
    name: ClassVar[str] = ""
    """What users call the type on the command line; by default the lower-case class name."""
    feature_bits: ClassVar[type[IntEnum] | None] = None
    """The feature bits of the type, by number (a virtio "Feature" enumeration): the log calls them by these names."""
    driver_writes: ClassVar[frozenset[str]] = frozenset()
    """Names of the configuration fields that the driver may write."""
    made_in_thread: ClassVar[bool | frozenset[str]] = False
    """Whether `serving.serve` and the command call ``__init__`` in a thread, as it asks file systems, which may hang.

    A set of parameters: where one of these is given. Then it must not use what belongs to trio's event loop: no clock,
    no tasks, no sockets of trio.
    """

    def __init__(self, *, config: Record | None = None, features: int = 0) -> None:
        self.config = Config(config)
        self.features = features
        self.log = DeviceLog(logging.getLogger(type(self).__module__), id_in_making() or self.name)
        """For what the device has to say: each line begins with its id, and their number is limited."""
        self.guest_ram = GuestRam()
        """For RAM that the guest gives to the device without a chain around it: hands it back to the host."""
        self.driver_features = 0
        """What the driver has accepted; valid from `features_ok` on."""
        self.shared_regions: dict[int, SharedRegion] = {}
        """What the driver may map, by id."""
        self.queues: list[Queue] = []
        for owner in reversed(type(self).__mro__):
            for name, declared in vars(owner).items():
                if isinstance(declared, QueueDeclaration) and name not in self.__dict__:
                    self.__dict__[name] = self.add_queue(declared.max_size)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        for name, declared in vars(cls).items():
            if isinstance(declared, QueueDeclaration) and (hasattr(Device, name) or name in _ATTRIBUTES):
                raise AuthorError(f"{cls.__name__}: a queue cannot be called {name!r}, which every device has already")

    if not TYPE_CHECKING:  # to which any attribute would be there

        def __getattr__(self, name: str) -> object:
            if name in _ATTRIBUTES and "queues" not in vars(self):
                raise _uninitialised(self, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def add_queue(self, max_size: int = 128) -> Queue:
        """Declare one more queue, in ``__init__``, for devices whose number of queues is an option."""
        added = Queue(len(self.queues), _checked_size(max_size))
        self.queues.append(added)
        return added

    def add_shared_memory(self, region_id: int, size: int) -> "SharedRegion":
        """Declare, in ``__init__``, a region of ``size`` bytes that the driver maps (2.10): a multiple of 4096.

        ``region_id`` is what the type of the device says, 0 to 255. Raises AuthorError for one that is there already.
        """
        from vfiouser_virtio.virtio.shared_memory import SharedRegion  # only here: few devices have any

        if region_id in self.shared_regions:
            raise AuthorError(f"add_shared_memory({region_id}, …): there is a region of that id already")
        added = self.shared_regions[region_id] = SharedRegion(region_id, size)
        return added

    def resize_queues(self, size: int) -> None:
        """Give every queue ``size`` entries (1 to 32768): the user's choice, made before a driver sees the device.

        Extend it where the configuration says something that follows from the size.
        """
        for each in self.queues:
            each.resize(size)

    def negotiated(self, feature: int) -> bool:
        """Whether the driver has accepted this feature bit (its number)."""
        return bool(self.driver_features >> feature & 1)

    # ---- hooks: synchronous, for what happens outside run() --------------------------------------------------------

    async def run(self) -> None:
        """The device at work, from DRIVER_OK to reset, when it is cancelled. Memory and interrupts only here."""

    def features_ok(self) -> bool:
        """Whether the device can work with `driver_features`; False refuses FEATURES_OK (3.1.1)."""
        return True

    def config_written(self, field: str, value: int | bytes) -> None:
        """The driver has written a field of `driver_writes`; it is in `config` already."""

    def take_over(self, predecessor: "Device") -> None:
        """This device goes on where ``predecessor`` was: learn what the driver had told that one since DRIVER_OK.

        Called in place of what a driver does at first, after `features_ok` and before `run`. The values of
        `driver_writes` are taken here; extend it where there is more. Raise DeviceError for what cannot be.
        """
        for field in self.driver_writes:
            self.config.set(**{field: predecessor.config[field]})

    def can_resume(self) -> bool:
        """Whether another object, made with the same options, can go on where this one has died with its process.

        For ``serve --supervise`` (docs/supervision.md). Such a device keeps nothing but what is in `config`, on the
        host, or in the buffers, and can do again what it was asked to do in any buffer that it has not completed.
        Where it is False, as by default, the driver is told that the device needs a reset.
        """
        return False

    def resumed(self, fields: Mapping[str, int | bytes]) -> None:
        """This device goes on where one of another process has died: ``fields`` are its `driver_writes`, and values.

        Called as `take_over` is. Raise DeviceError for what cannot be: then the device needs a reset.
        """
        if fields:
            self.config.set(**fields)

    def reset(self) -> None:
        """The driver has reset the device: forget what it had told us."""

    def confine(self) -> HostAccess:
        """The process is about to give up its rights (``serve --sandbox``): say what the device needs afterwards.

        What is open stays usable. Do here what will not be possible any more, such as starting a program. Called before
        the device is served, in a thread. Raise DeviceError for a device that cannot do with less.
        """
        return NO_ACCESS

    def close(self) -> None:
        """The device is no longer served: let go of files and sockets of the host."""


_ATTRIBUTES = frozenset({"config", "features", "driver_features", "guest_ram", "queues", "shared_regions"})
"""What `Device.__init__` makes."""


def _checked_size(max_size: int) -> int:
    if not 0 < max_size <= MAX_QUEUE_SIZE or max_size & (max_size - 1):
        raise AuthorError(f"queue(max_size={max_size}): expected a power of two, 1 to {MAX_QUEUE_SIZE}")
    return max_size


def _uninitialised(device: Device, name: str) -> AuthorError:
    return AuthorError(
        f"{type(device).__name__}: there is no self.{name} before its __init__ has called super().__init__()"
    )
