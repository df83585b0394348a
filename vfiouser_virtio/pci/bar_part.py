"""Base of all that lies in a BAR: registers, memories, doorbells, FIFOs; and binding of their hooks to a device."""

import copy
import inspect
from collections.abc import Callable, Collection
from typing import Any, Protocol, Self

from vfiouser_virtio.errors import AuthorError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class BarPart:
    """Part of a BAR: ``size`` bytes at ``offset``. As an attribute of a device's class it is a declaration.

    ``bar`` is the BAR's index; by default that of the `bar` which is declared above it. ``widths`` are the numbers of
    bytes that one access may have, where not all are allowed.
    """

    mapped = False
    """The guest maps it: its accesses are not seen."""

    def __init__(self, offset: int, size: int, bar: int | None, widths: Collection[int] = ()) -> None:
        if not isinstance(offset, int):
            raise AuthorError(f"offset {offset!r:.60}: expected a number")
        if offset < 0 or (size in (2, 4, 8) and offset % min(size, 4)):
            raise AuthorError(f"offset {offset:#x} of {size} bytes: expected a multiple of {min(size, 4)}")
        self.offset, self.size, self.bar = offset, size, bar
        self.widths = checked_widths(widths)
        self.name = f"{offset:#x}"
        self.declared_in = ""
        """The class that it is declared in, once that is there."""
        self.reads = 0
        """How often a driver has read it."""
        self.writes = 0
        self.write_hook: Callable[..., Any] | None = None
        self.read_hook: Callable[..., Any] | None = None

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.declared_in = name, owner.__name__

    def __get__(self, instance: object, owner: type) -> Self:
        # What a device has of its own hides the declaration; where it does not, it has not been made yet.
        if instance is not None:
            raise AuthorError(f"{owner.__name__}: there is no self.{self.name} before super().__init__() was called")
        return self

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.size

    def copied(self, name: str, offset: int) -> Self:
        """A copy of the declaration, for one device."""
        mine = copy.copy(self)
        mine.name, mine.offset = name, offset
        return mine

    def bound(self, owner: object, name: str, offset: int, index: int | None = None) -> Self:
        """One of a device's own, with the hooks of ``owner``, which is the device or a bank of it.

        ``index`` is that in an array. Raises AuthorError for a hook with another number of parameters.
        """
        raise NotImplementedError

    def strays(self) -> Collection[str]:
        """Attributes that nothing has declared: misspelt fields, as a rule."""
        return ()

    @property
    def polled(self) -> int | None:
        """What a driver that polls it sees; None where that says nothing of what it waits for."""
        return None

    def power_on(self) -> None:
        """Power-on state, without a hook."""
        raise NotImplementedError

    def read_part(self, start: int, count: int) -> bytes:
        """What a driver reads: ``count`` bytes from ``start`` on, all within, with all that this causes."""
        raise NotImplementedError

    def write_part(self, start: int, data: bytes) -> None:
        """What a driver writes from ``start`` on, with all that this causes."""
        raise NotImplementedError


def checked_widths(widths: Collection[int]) -> frozenset[int]:
    """The widths, in bytes. AuthorError for what no access has."""
    if not isinstance(widths, Collection) or not set(widths) <= {1, 2, 4, 8}:
        raise AuthorError(f"widths={widths!r:.60}: expected some of 1, 2, 4 and 8, which are bytes")
    return frozenset(widths)


class Declared(Protocol):
    """Declaration with hooks: a part of a BAR, or an array of them."""

    name: str
    declared_in: str


def check_hook(declared: Declared, method: Callable[..., Any]) -> None:
    """AuthorError for a method that would take the place of the declaration whose hook it is, or of another class."""
    if declared.declared_in:
        raise AuthorError(
            f"{method.__qualname__}: {declared.name} is of {declared.declared_in}, which would have this hook too: "
            "define a method with the name of its hook there, or declare the register again"
        )
    frame = inspect.currentframe()
    body = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    if body is not None and body.f_locals.get(method.__name__) is declared:
        raise AuthorError(
            f"{method.__name__}: give its hook another name, or the register is gone: def {method.__name__}_written"
        )


def hook_of(
    function: Callable[..., Any] | None,
    owner: object,
    name: str,
    index: int | None,
    least: int,
    most: int | None = None,
) -> tuple[Callable[..., Any] | None, int]:
    """The hook as a call without ``index``, and how many parameters it takes then; None where there is no hook.

    A method of ``owner``'s class that has replaced the one that was decorated is taken. Raises AuthorError for a number
    of parameters that is not from ``least`` to ``most``, and for an async function.
    """
    if function is None:
        return None, 0
    hook: Callable[..., Any] = getattr(owner, function.__name__, None) or function.__get__(owner)
    if inspect.iscoroutinefunction(hook):
        raise AuthorError(f"{name}: its hook {hook.__name__}() is async: hooks are plain methods, only run() may wait")
    most = least if most is None else most
    extra = 0 if index is None else 1
    count = sum(each.kind in _POSITIONAL for each in inspect.signature(hook).parameters.values()) - extra
    if not least <= count <= most:
        expected = " to ".join(str(number + extra) for number in sorted({least, most}))
        raise AuthorError(
            f"{name}: its hook {hook.__name__}() has {count + extra} parameters beside self, not {expected}"
        )
    if index is None:
        return hook, count
    return lambda *more: hook(index, *more), count
