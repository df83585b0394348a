"""Fields of a register: bits that have a name.

::

    class Control(Register):
        enable = flag(0)                     # bit 0, a bool
        mode = field(3, 1)                   # bits 3:1, an int
        done = flag(31, access="w1c")        # what the driver may do with it, where that is not as in the rest
"""

from typing import TYPE_CHECKING, Literal, overload

from vfiouser_virtio.errors import AuthorError

if TYPE_CHECKING:
    from vfiouser_virtio.pci.register import Register

Access = Literal["rw", "ro", "w1c", "w1s", "rc", "wo"]
"""What a driver may do with bits.

``rw`` reads and writes, ``ro`` only reads, ``w1c`` clears them by writing ones, ``w1s`` sets them by writing ones,
``rc`` clears them by reading, ``wo`` writes what reads as zero.
"""

ACCESSES: tuple[Access, ...] = ("rw", "ro", "w1c", "w1s", "rc", "wo")


class BitField:
    """Bits ``high`` to ``low`` of a register; base of `field` and `flag`."""

    def __init__(self, high: int, low: int, access: Access | None) -> None:
        if not 0 <= low <= high < 64:
            raise AuthorError(f"field({high}, {low}): expected the highest and the lowest bit, 63 to 0")
        if access is not None and access not in ACCESSES:
            raise AuthorError(f"access={access!r} of bits {high}:{low}: expected one of {', '.join(ACCESSES)}")
        self.name = ""
        self.high, self.low, self.access = high, low, access
        self.maximum = (1 << high - low + 1) - 1
        self.mask = self.maximum << low

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def of(self, value: int) -> int:
        """The field of a register's ``value``."""
        return value >> self.low & self.maximum

    def put(self, register: "Register", value: int) -> None:
        """Change the field. AuthorError for a value that it has no room for."""
        if not 0 <= value <= self.maximum:
            raise AuthorError(f"{register.name}.{self.name} = {value:#x}: it has {self.high - self.low + 1} bits")
        register.bits = register.bits & ~self.mask | value << self.low


class IntField(BitField):
    """Field that is a number: see `field`."""

    @overload
    def __get__(self, register: None, owner: type) -> "IntField": ...

    @overload
    def __get__(self, register: "Register", owner: type) -> int: ...

    def __get__(self, register: "Register | None", owner: type) -> "int | IntField":
        return self if register is None else register.bits >> self.low & self.maximum

    def __set__(self, register: "Register", value: int) -> None:
        self.put(register, value)


class FlagField(BitField):
    """Field of one bit that is a bool: see `flag`."""

    @overload
    def __get__(self, register: None, owner: type) -> "FlagField": ...

    @overload
    def __get__(self, register: "Register", owner: type) -> bool: ...

    def __get__(self, register: "Register | None", owner: type) -> "bool | FlagField":
        return self if register is None else bool(register.bits & self.mask)

    def __set__(self, register: "Register", value: bool) -> None:
        self.put(register, int(value))


def field(high: int, low: int | None = None, *, access: Access | None = None) -> IntField:
    """Bits ``high`` to ``low`` as a number, as data sheets write [high:low]; one bit without ``low``.

    ``access``: what the driver may do with them, where it is not what the register's `access` says.
    """
    return IntField(high, high if low is None else low, access)


def flag(bit: int, *, access: Access | None = None) -> FlagField:
    """One bit as a bool; ``access`` as with `field`."""
    return FlagField(bit, bit, access)
