"""Arrays of registers, and banks: groups of registers that are repeated.

::

    class Channel(Bank):
        address = Register(0x00, width=64)
        length = Register(0x08)
        start = Doorbell(0x0C)

    class MyChip(PciDevice):
        regs = bar(0, size=0x1000)
        scratch = array(Register(0x80), count=8)              # self.scratch[3].value
        channels = banks(Channel, 0x100, count=4, stride=0x40)    # self.channels[3].address.value
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeGuard, TypeVar, overload

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci.bar_part import BarPart, check_hook
from vfiouser_virtio.pci.class_checks import check_bank_body

if TYPE_CHECKING:
    from vfiouser_virtio.pci.device import PciDevice

Method = TypeVar("Method", bound=Callable[..., Any])
Part = TypeVar("Part", bound=BarPart)
MAX_COUNT = 65536


class Bank:
    """Group of registers of a device, declared in the body of a subclass; offsets count from where a bank begins.

    Hooks in it are methods of the bank: ``self.index`` says which one it is, ``self.device`` is the device.
    """

    device: Any
    index: int
    _declared: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, device: "PciDevice", index: int) -> None:
        self.device, self.index = device, index

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("device", "index"):
            if is_declaration(vars(cls).get(name)):
                raise AuthorError(f"{cls.__name__}: a register cannot be called {name!r}, which every bank has already")
        cls._declared = declared_names(cls)
        check_bank_body(cls)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._declared:
            raise replacing(self, name, value)
        super().__setattr__(name, value)


AnyBank = TypeVar("AnyBank", bound=Bank)


class Repeated:
    """Base of what is declared several times: ``count`` of them, ``stride`` bytes from one to the next."""

    def __init__(self, count: int, stride: int) -> None:
        if not 0 < count <= MAX_COUNT or stride <= 0:
            raise AuthorError(f"count={count}, stride={stride:#x}: expected 1 to {MAX_COUNT}, and a stride above 0")
        self.count, self.stride = count, stride
        self.name = self.declared_in = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.declared_in = name, owner.__name__

    def unmade(self, owner: type) -> AuthorError:
        """What an access before ``super().__init__()`` raises."""
        return AuthorError(f"{owner.__name__}: there is no self.{self.name} before super().__init__() was called")


class PartArray(Repeated, Generic[Part]):
    """Declaration made by `array`; in a device a sequence of its parts."""

    def __init__(self, element: Part, count: int, stride: int) -> None:
        super().__init__(count, stride)
        self.element = element

    @overload
    def __get__(self, instance: None, owner: type) -> "PartArray[Part]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> Sequence[Part]: ...

    def __get__(self, instance: object, owner: type) -> "PartArray[Part] | Sequence[Part]":
        if instance is not None:
            raise self.unmade(owner)
        return self

    def on_write(self, method: Method) -> Method:
        """As `Register.on_write`; the method gets the index first."""
        check_hook(self, method)
        return self._hooked("on_write", method)

    def on_read(self, method: Method) -> Method:
        """As `Register.on_read`; the method gets the index first."""
        check_hook(self, method)
        return self._hooked("on_read", method)

    def _hooked(self, kind: str, method: Method) -> Method:
        decorate = getattr(self.element, kind, None)
        if decorate is None:
            raise AuthorError(f"{self.name}: a {type(self.element).__name__} has no {kind}")
        decorate(method)
        return method


class BankArray(Repeated, Generic[AnyBank]):
    """Declaration made by `banks`; in a device a sequence of its banks."""

    def __init__(self, bank: type[AnyBank], offset: int, count: int, stride: int, bar: int | None) -> None:
        super().__init__(count, stride)
        self.bank, self.offset, self.bar = bank, offset, bar

    @overload
    def __get__(self, instance: None, owner: type) -> "BankArray[AnyBank]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> Sequence[AnyBank]: ...

    def __get__(self, instance: object, owner: type) -> "BankArray[AnyBank] | Sequence[AnyBank]":
        if instance is not None:
            raise self.unmade(owner)
        return self


def array(element: Part, *, count: int, stride: int | None = None) -> PartArray[Part]:
    """``count`` registers like ``element``, ``stride`` bytes apart: by default one behind the other."""
    if not isinstance(element, BarPart):
        raise AuthorError(f"array({element!r:.60}): expected one element: array(Register(offset), count=…)")
    return PartArray(element, count, element.size if stride is None else stride)


def banks(bank: type[AnyBank], offset: int, *, count: int, stride: int, bar: int | None = None) -> BankArray[AnyBank]:
    """``count`` banks, the first at ``offset``, ``stride`` bytes apart."""
    if not (inspect.isclass(bank) and issubclass(bank, Bank)):
        raise AuthorError(f"banks({bank!r:.60}): expected a class: class Channel(Bank): …")
    return BankArray(bank, offset, count, stride, bar)


Declaration: TypeAlias = "BarPart | PartArray[Any] | BankArray[Any]"


def is_declaration(value: object) -> TypeGuard[Declaration]:
    """Whether an attribute of a class declares a part of a BAR, or several."""
    return isinstance(value, (BarPart, Repeated))


def declarations(of: type) -> Iterator[tuple[str, object]]:
    """All attributes of a class and of those that it extends, in order, each once."""
    found: dict[str, object] = {}
    for owner in reversed(of.__mro__):
        found |= vars(owner)
    yield from found.items()


def declared_names(of: type) -> frozenset[str]:
    """Names of all that a class declares in BARs."""
    return frozenset(name for name, each in declarations(of) if is_declaration(each))


def replacing(owner: object, name: str, value: object) -> AuthorError:
    """What an assignment to what is declared raises: no driver would see it, and its value is meant."""
    return AuthorError(
        f"{type(owner).__name__}.{name} = …: no driver would see {value!r:.40}; assign to self.{name}.value"
    )


def lay_out(name: str, declared: Declaration, base: int = 0) -> Iterator[tuple[int, BarPart, str]]:
    """Offset, declaration and name of each part of what is declared."""
    if isinstance(declared, BarPart):
        yield base + declared.offset, declared, name
    elif isinstance(declared, PartArray):
        for index in range(declared.count):
            yield base + declared.element.offset + index * declared.stride, declared.element, f"{name}[{index}]"
    else:
        for index in range(declared.count):
            for inner, each in declarations(declared.bank):
                if is_declaration(each):
                    at = base + declared.offset + index * declared.stride
                    yield from lay_out(f"{name}[{index}].{inner}", each, at)


def place(
    device: "PciDevice", owner: object, name: str, declared: Declaration, base: int, prefix: str
) -> list[BarPart]:
    """Give ``owner``, the device or a bank of it, its own of what is declared; returns all the parts of it."""
    path = f"{prefix}{name}"
    made: object
    if isinstance(declared, BarPart):
        made = part = declared.bound(owner, path, base + declared.offset)
        parts: list[BarPart] = [part]
    elif isinstance(declared, PartArray):
        element, step = declared.element, declared.stride
        made = parts = [
            element.bound(owner, f"{path}[{index}]", base + element.offset + index * step, index)
            for index in range(declared.count)
        ]
    else:
        groups: list[Bank] = []
        made, parts = groups, []
        for index in range(declared.count):
            group = declared.bank(device, index)
            groups.append(group)
            at = base + declared.offset + index * declared.stride
            for inner, each in declarations(declared.bank):
                if is_declaration(each):
                    parts += place(device, group, inner, each, at, f"{path}[{index}].")
    vars(owner)[name] = made
    return parts
