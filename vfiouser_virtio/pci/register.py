"""Registers of a device: declared in its class body, and in each device an object with a value.

::

    ident = Register(0x00, reset=0x0100_00ED, access="ro")
    control = Control(0x04)                  # with the fields of the class `Control`: see `fields`

    @control.on_write
    def control_written(self, value: int, old: int) -> None: ...
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Self, TypeVar

import trio

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci.bar_part import BarPart, check_hook, hook_of
from vfiouser_virtio.pci.fields import ACCESSES, Access, BitField

Method = TypeVar("Method", bound=Callable[..., Any])
WIDTHS = (8, 16, 32, 64)


class Register(BarPart):
    """Register at ``offset`` bytes of its BAR, ``width`` bits wide: 8, 16, 32 or 64, little-endian.

    A driver's access of another width is merged with the bytes that it does not touch, or split over neighbours, as
    PCI's byte enables do; with ``widths``, accesses of other numbers of bytes are refused instead: logged, all-ones to
    a reader, and lost from a writer.

    ``access`` is that of all bits that no field says otherwise of. ``writable`` are the bits that a driver can change
    at all: by default those of the fields of the class, if it has any, else all. ``reset`` is the power-on value.
    A ``sticky`` one has that when the device is made, and no reset changes it (PCIe 4.0 §7.4: ROS, RWS, RW1CS).

    The device itself reads and changes ``value`` and the fields without any of that.
    """

    def __init__(
        self,
        offset: int,
        *,
        width: int = 32,
        reset: int = 0,
        access: Access = "rw",
        writable: int | None = None,
        sticky: bool = False,
        widths: Collection[int] = (),
        bar: int | None = None,
    ) -> None:
        if width not in WIDTHS:
            raise AuthorError(f"a register at {offset:#x} of {width} bits: expected 8, 16, 32 or 64")
        if access not in ACCESSES:
            raise AuthorError(
                f"access={access!r} of the register at {offset:#x}: expected one of {', '.join(ACCESSES)}"
            )
        super().__init__(offset, width // 8, bar, widths)
        self.width = width
        self.all_bits = (1 << width) - 1
        if not 0 <= reset <= self.all_bits:
            raise AuthorError(f"reset={reset:#x} of the register at {offset:#x} does not fit its {width} bits")
        self.reset_value = reset
        self.sticky = sticky
        self.access: Access = access
        self._set_masks(writable)
        self.bits = reset
        """The value as it is stored."""
        self.written: Callable[..., None] | None = None
        self.reading: Callable[[], int | None] | None = None
        self.takes = 0
        self.answer = 0
        self.unseen = False
        """Whether a driver has written it since the last `wait_written`."""
        self.waiters: trio.lowlevel.ParkingLot | None = None
        self.declaration: Register | None = None
        """Of one of a device's own: that in its class."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, each in vars(cls).items():
            if isinstance(each, BitField) and (hasattr(Register, name) or name in _ATTRIBUTES):
                raise AuthorError(f"{cls.__name__}.{name}: every register has a {name} already: call the field {name}_")

    def _set_masks(self, writable: int | None) -> None:
        fields = list(self.fields().values())
        if fields and max(field.high for field in fields) >= self.width:
            raise AuthorError(f"{type(self).__name__} at {self.offset:#x} has a field above its {self.width} bits")
        covered = 0
        for field in fields:
            if covered & field.mask:
                raise AuthorError(f"{type(self).__name__}.{field.name}: bits {field.high}:{field.low} have two fields")
            covered |= field.mask
        rest = self.all_bits if writable is None and not fields else covered if writable is None else writable
        masks: dict[str, int] = dict.fromkeys(ACCESSES, 0)
        for field in fields:
            if field.access is not None:
                masks[field.access] |= field.mask
                rest &= ~field.mask
        masks[self.access] |= rest & self.all_bits
        self.plain_bits = masks["rw"] | masks["wo"]
        """Bits that become what is written."""
        self.clear_bits = masks["w1c"]
        self.set_bits = masks["w1s"]
        self.read_clears = masks["rc"]
        self.hidden = masks["wo"]
        """Bits that read as zero."""

    @classmethod
    def fields(cls) -> Mapping[str, BitField]:
        """The fields by name, in the order of their declaration."""
        found: dict[str, BitField] = {}
        for owner in reversed(cls.__mro__):
            found |= {name: each for name, each in vars(owner).items() if isinstance(each, BitField)}
        return found

    # ---- for the device ------------------------------------------------------------------------------------------

    @property
    def value(self) -> int:
        """All bits. AuthorError for what it has no room for; no hook runs."""
        return self.bits

    @value.setter
    def value(self, value: int) -> None:
        if not 0 <= value <= self.all_bits:
            raise AuthorError(f"{self.name} = {value:#x}: it has {self.width} bits")
        self.bits = value

    def __getitem__(self, field: str) -> int:
        """A field by its name. KeyError where there is none of it."""
        return self.fields()[field].of(self.bits)

    def __setitem__(self, field: str, value: int) -> None:
        self.fields()[field].put(self, value)

    def on_write(self, method: Method) -> Method:
        """Decorator of the method that runs after a driver has written the register.

        Its parameter, if it has one, is what was written, as wide as the register: bytes that the driver has not
        touched are as they were, or zero where that means nothing. A second one is the value before. In an array the
        index comes first. ``value`` has changed already, as `access` says.
        """
        check_hook(self, method)
        self.write_hook = method
        return method

    def on_read(self, method: Method) -> Method:
        """Decorator of the method that runs when a driver reads the register: what it returns is what the driver gets.

        That is not stored; with None the driver gets ``value``. In an array it gets the index.
        """
        check_hook(self, method)
        self.read_hook = method
        return method

    async def wait_written(self) -> int:
        """Wait until a driver has written it since the last call; the value then.

        However often it was written meanwhile, that is one: to see each write takes `on_write`.
        """
        await trio.lowlevel.checkpoint()
        while not self.unseen:
            if self.waiters is None:
                self.waiters = trio.lowlevel.ParkingLot()
            await self.waiters.park()
        self.unseen = False
        return self.bits

    # ---- for the bar ---------------------------------------------------------------------------------------------

    @property
    def polled(self) -> int:
        """What the last reader got; or would get now, where a read has no effect."""
        return self.bits if self.reads_plainly else self.answer

    def strays(self) -> Collection[str]:
        """Attributes that the declaration has not: misspelt fields. To look at each assignment would be slow."""
        if self.declaration is None or len(vars(self)) == len(vars(self.declaration)):
            return ()
        return sorted(vars(self).keys() - vars(self.declaration).keys())

    @property
    def reads_plainly(self) -> bool:
        """Whether to read it is nothing but that."""
        return self.reading is None and not self.read_clears and not self.hidden and not self.widths

    def bound(self, owner: object, name: str, offset: int, index: int | None = None) -> Self:
        """One of a device's own, with the hooks of ``owner``, which is the device or a bank of it."""
        mine = self.copied(name, offset)
        mine.declaration = self
        mine.written, mine.takes = hook_of(self.write_hook, owner, name, index, 0, 2)
        mine.reading, _ = hook_of(self.read_hook, owner, name, index, 0)
        return mine

    def power_on(self) -> None:
        """Back to the power-on value, but for what is sticky; no hook runs."""
        if not self.sticky:
            self.bits = self.reset_value
        self.unseen = False

    def driver_read(self, enabled: int = -1) -> int:
        """What a driver reads, with all that this causes; ``enabled`` has ones where there are bytes that it reads."""
        self.reads += 1
        answer = None if self.reading is None else self.reading()
        if answer is None:
            answer = self.bits & ~self.hidden
        elif not 0 <= answer <= self.all_bits:
            raise AuthorError(f"{self.name} = {answer:#x}: it has {self.width} bits")
        if self.read_clears:
            self.bits &= ~(self.read_clears & enabled)
        self.answer = answer
        return answer

    def driver_write(self, value: int, enabled: int) -> None:
        """What a driver writes, with all that this causes; ``enabled`` has ones where there are bytes of its."""
        self.writes += 1
        old = self.bits
        self.bits = old & ~(self.plain_bits & enabled | value & self.clear_bits) | value & (
            self.plain_bits | self.set_bits
        )
        self.unseen = True
        if self.waiters is not None:
            self.waiters.unpark_all()
        if self.written is not None:
            if not self.takes:
                self.written()
                return
            seen = value | old & self.plain_bits & ~self.hidden & ~enabled
            if self.takes == 1:
                self.written(seen)
            else:
                self.written(seen, old)

    def read_part(self, start: int, count: int) -> bytes:
        """Some bytes of it, or all."""
        enabled = (1 << 8 * count) - 1 << 8 * start
        return self.driver_read(enabled).to_bytes(self.size, "little")[start : start + count]

    def write_part(self, start: int, data: bytes) -> None:
        """Some bytes of it, or all."""
        shift = 8 * start
        enabled = (1 << 8 * len(data)) - 1 << shift
        self.driver_write(int.from_bytes(data, "little") << shift, enabled)


_ATTRIBUTES = frozenset(vars(Register(0)))
"""What a register is made of, so that no field can be called that."""
