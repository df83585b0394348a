"""Record of what a driver has touched: accesses of what is not modelled, and what is modelled and was never used."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError, PeerError
from vfiouser_virtio.pci.bar_part import BarPart

if TYPE_CHECKING:
    from vfiouser_virtio.pci.bar_space import BarSpace

UnmodelledPolicy = Literal["log", "zero", "ones", "error"]
"""What becomes of accesses of what is not modelled.

``log``: they read as zero, and each kind is logged once; ``zero``, ``ones``: they read as that, in silence; ``error``:
the client gets an error, which QEMU prints.
"""

MAX_KINDS = 4096
"""Kinds of accesses that are remembered: a driver that touches all of a BAR gets no more of our memory."""


STEP = 4096
"""Registers that are looked at in one go, some 0.5 ms: a device may have 65,536 in each array."""

_Result = TypeVar("_Result")


@dataclass(slots=True)
class UnmodelledAccess:
    """Accesses of one kind: this many bytes at this offset, read or written."""

    bar: int
    offset: int
    size: int
    write: bool
    times: int
    first: tuple[int, float]
    """Its number among all accesses, from 1, and seconds since the device was made."""
    last: tuple[int, float]
    value: int
    """What was written last, or answered."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "bar": self.bar,
            "offset": self.offset,
            "bytes": self.size,
            "access": "write" if self.write else "read",
            "times": self.times,
            "value": self.value,
            "first": {"access": self.first[0], "seconds": round(self.first[1], 3)},
            "last": {"access": self.last[0], "seconds": round(self.last[1], 3)},
        }

    def __str__(self) -> str:
        """For people: ``write 4 bytes at BAR0+0x504: 0x1, 3 times``."""
        what = "write" if self.write else "read"
        times = "once" if self.times == 1 else f"{self.times} times"
        return f"{what} {self.size} bytes at BAR{self.bar}+{self.offset:#x}: {self.value:#x}, {times}"


class Unused(NamedTuple):
    """Registers and hooks that a driver has not touched."""

    registers: list[str]
    """What is modelled and was neither read nor written."""
    hooks: list[str]
    """Hooks that have never run, as ``control.on_write``."""


class Accesses:
    """Accesses of a driver to one device, whose BARs are in ``spaces``."""

    def __init__(self, log: DeviceLog, policy: UnmodelledPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        if policy not in get_args(UnmodelledPolicy):
            raise AuthorError(f"unmodelled = {policy!r}: expected one of {', '.join(get_args(UnmodelledPolicy))}")
        self.policy: UnmodelledPolicy = policy
        self.spaces: list[BarSpace] = []
        self.unmodelled: dict[tuple[int, int, int, bool], UnmodelledAccess] = {}
        self.others = 0
        """Accesses of kinds that were too many to be remembered."""
        self.resets = 0
        """How often the device was reset: what a driver has polled before is another thing than what it polls now."""
        self.log, self._clock = log, clock
        self._begun = clock()

    @property
    def count(self) -> int:
        """How often BARs were accessed."""
        return sum(space.accesses for space in self.spaces)

    @property
    def parts(self) -> Sequence[BarPart]:
        """All that is modelled."""
        return [part for space in self.spaces for part in space.parts]

    def read(self, bar: int, offset: int, count: int) -> bytes:
        """The answer to a read of what is not modelled. PeerError, where the policy is ``error``."""
        answer = (b"\xff" if self.policy == "ones" else b"\0") * count
        self._note(bar, offset, count, False, int.from_bytes(answer[:8], "little"))
        return answer

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """A write of what is not modelled, which is lost. PeerError, where the policy is ``error``."""
        self._note(bar, offset, len(data), True, int.from_bytes(data[:8], "little"))

    def _note(self, bar: int, offset: int, count: int, write: bool, value: int) -> None:
        now = self.count, self._clock() - self._begun
        key = bar, offset, count, write
        known = self.unmodelled.get(key)
        if known is not None:
            known.times += 1
            known.last, known.value = now, value
        elif len(self.unmodelled) < MAX_KINDS:
            self.unmodelled[key] = UnmodelledAccess(bar, offset, count, write, 1, now, now, value)
        else:
            self.others += 1
        where = f"{count} bytes at BAR{bar}+{offset:#x}"
        if self.policy == "error":
            raise PeerError(f"{'write' if write else 'read'} of {where}, which is not modelled (unmodelled=error)")
        if self.policy == "log" and known is None:
            if write:
                self.log.once(key, "the driver writes %#x in %s, which is not modelled", value, where)
            else:
                self.log.once(key, "the driver reads %s, which is not modelled", where)

    def unused(self) -> Unused:
        """What a driver has not touched."""
        return drained(self.unused_in_steps())

    def unused_in_steps(self) -> Generator[None, None, Unused]:
        """As `unused`; between the steps others may have their turns."""
        registers, hooks = list[str](), list[str]()
        for number, part in enumerate(self.parts, 1):
            if not part.reads and not part.writes and not part.mapped:
                registers.append(part.name)
            if part.write_hook is not None and not part.writes:
                hooks.append(f"{part.name}.on_write")
            if part.read_hook is not None and not part.reads:
                hooks.append(f"{part.name}.on_read")
            if not number % STEP:
                yield
        return Unused(registers, hooks)

    def report(self, unused: Unused | None = None) -> Mapping[str, Any]:
        """What a driver has touched that is not modelled, the oldest first, and what it has not used; for JSON."""
        registers, hooks = unused or self.unused()
        return {
            "accesses": self.count,
            "unmodelled": [each.as_dict() for each in self.unmodelled.values()],
            "unmodelled_others": self.others,
            "modelled": len(self.parts),
            "unused": registers,
            "unused_hooks": hooks,
        }

    def summary(self, unused: Unused | None = None) -> str:
        """The report in one line for a log."""
        registers, hooks = unused or self.unused()
        text = f"{self.count} accesses; {len(self.parts) - len(registers)} of {len(self.parts)} registers were used"
        if hooks:
            text += f", {len(hooks)} hooks never ran"
        if self.unmodelled:
            most = sorted(self.unmodelled.values(), key=lambda each: -each.times)[:3]
            text += f"; not modelled, {len(self.unmodelled)} kinds: {'; '.join(map(str, most))}"
        return text


def drained(steps: Generator[None, None, _Result]) -> _Result:
    """What is returned in the end, all steps done at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _Result = end.value
            return result
