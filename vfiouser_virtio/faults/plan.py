"""Plan of a device's faults: at which of all the opportunities each of them happens, and the log of what has happened.

Whether a fault is due depends on nothing but its seed, its place among the faults that were asked for, its queue, and
how many opportunities there have been before on that queue; each opportunity is counted, whatever else happens at it.
So timing makes no difference, and the same requests meet the same faults. But some are due at times: they happen at the
first opportunity after that, or, where they need none, by themselves (`ticks`). Of faults that exclude each other and
are due at once one happens: the first in the order of the code (a lost interrupt cannot be late). Counts go on over
resets.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b, shake_256
from itertools import chain
from typing import Any

from vfiouser_virtio.device_log import quoted
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.faults.fault_spec import FaultSpec
from vfiouser_virtio.faults.log import FaultLog, Recorded, read_log
from vfiouser_virtio.faults.profiles import PROFILES
from vfiouser_virtio.faults.spec import parse_fault

_WORD = 1 << 64

Now = Callable[[], tuple[int, float] | None]
"""How many DRIVER_OKs there have been, and the seconds since the last; None while the driver has not set it."""


class Hit:
    """Fault that happens now. `did` has to be called, once: that is the line in the log."""

    __slots__ = ("_armed", "_digest", "_draws", "_when", "n", "queue")

    def __init__(
        self, armed: "Armed", queue: int | None, n: int, digest: bytes, when: tuple[int, float] | None = None
    ) -> None:
        self._armed = armed
        self._when = when
        self._digest = digest
        self._draws = 0
        self.queue = queue
        self.n = n

    def __getitem__(self, argument: str) -> Any:
        """The value of an argument of the fault."""
        return self._armed.spec.arguments[argument]

    @property
    def name(self) -> str:
        """Which fault it is."""
        return self._armed.spec.name

    def draw(self, limit: int) -> int:
        """A number from 0 to ``limit - 1``, another one each time, that the seed and the place decide."""
        self._draws += 1
        word = blake2b(self._digest + self._draws.to_bytes(4, "little"), digest_size=8).digest()
        return int.from_bytes(word, "little") % limit

    def bytes(self, count: int) -> bytes:
        """``count`` random bytes, which the seed and the place decide; others each time."""
        self._draws += 1
        return shake_256(self._digest + self._draws.to_bytes(4, "little")).digest(count)

    def did(self, what: str) -> None:
        """Log what was done."""
        armed = self._armed
        said = {"fault": armed.spec.name, "spec": armed.place, "queue": self.queue, "n": self.n, "did": what}
        if self._when is not None:
            life, since = self._when
            said |= {"life": life, "since": round(since, 6)}
        armed.log.add(**said)


class Armed:
    """Fault that was asked for, and how often it could have happened, and has, on each queue."""

    __slots__ = (
        "_fired",
        "_now",
        "_past",
        "_recorded",
        "_seed",
        "_seen",
        "_skipped",
        "_ticks",
        "log",
        "place",
        "running",
        "spec",
    )

    def __init__(
        self, spec: FaultSpec, place: int, seed: int, log: FaultLog, recorded: Recorded | None, now: "Now"
    ) -> None:
        self.spec = spec
        self._now = now
        self._past: dict[int | None, tuple[int, float]] = {}
        self._skipped = (0, 0.0)
        self._ticks = 0
        self.place = place
        self.log = log
        self.running = True
        self._recorded = recorded
        self._seed = f"{seed}:{place}:{spec.name}"
        self._seen: dict[int | None, int] = {}
        self._fired: dict[int | None, int] = {}

    @property
    def happened(self) -> int:
        """How often it has."""
        return sum(self._fired.values())

    def look(self, queue: int | None, running: bool) -> Hit | None:
        """Count an opportunity; the hit if the fault happens at it."""
        spec = self.spec
        if spec.queue is not None and queue != spec.queue:
            return None
        n = self._seen[queue] = self._seen.get(queue, 0) + 1
        if not (running and self.running) or spec.happens_by_itself:
            return None
        recorded = self._recorded
        if recorded is not None:
            if (self.place, queue, n) not in recorded.hits:
                return None
        elif not self._is_due(queue, n):
            return None
        self._fired[queue] = self._fired.get(queue, 0) + 1
        return Hit(self, queue, n, self._digest(queue, n))

    def _is_due(self, queue: int | None, n: int) -> bool:
        spec = self.spec
        if n <= spec.after or (spec.count is not None and self._fired.get(queue, 0) >= spec.count):
            return False
        if (spec.at and n not in spec.at) or (spec.every is not None and (n - spec.after) % spec.every):
            return False
        if (spec.timed or spec.after_time) and not self._time_has_come(queue):
            return False
        return self._chance(queue, n)

    def _chance(self, queue: int | None, n: int) -> bool:
        p = self.spec.p
        return p is None or int.from_bytes(self._digest(queue, n)[:8], "little") < p * _WORD

    def _time_has_come(self, queue: int | None) -> bool:
        """Whether one of the times has come since it was asked before."""
        now, spec = self._now(), self.spec
        if now is None:
            return False
        life, elapsed = now
        if not spec.timed:
            return elapsed >= spec.after_time
        due = spec.due_time(elapsed)
        before = max(self._past.get(queue, (0, 0.0)), self._skipped)
        if due is None or (before[0] == life and due <= before[1]):
            return False
        self._past[queue] = life, due
        return True

    def skip(self) -> None:
        """Times until now are over: it was stopped."""
        self._skipped = self._now() or self._skipped

    # ---- without an opportunity ----------------------------------------------------------------------------------

    def next_tick(self, life: int, elapsed: float) -> float | None:
        """When it is due next, in seconds since the DRIVER_OK with this number; None: not any more."""
        if self._recorded is None:
            return self.spec.next_time(elapsed)
        times = self._recorded.ticks.get((self.place, life), ())
        return min((at for at in times if at > elapsed), default=None)

    def tick(self, life: int, elapsed: float, possible: bool) -> Hit | None:
        """It is due now: the hit if it happens."""
        spec, queue = self.spec, (self.spec.queue or 0) if self.spec.fault.of_queue else None
        recorded = self._recorded
        n = self._ticks = self._ticks + 1 if recorded is None else recorded.ticks[self.place, life][elapsed]
        if not (possible and self.running) or (spec.count is not None and self._fired.get(queue, 0) >= spec.count):
            return None
        if recorded is None and not self._chance(queue, n):
            return None
        self._fired[queue] = self._fired.get(queue, 0) + 1
        return Hit(self, queue, n, self._digest(queue, n), (life, elapsed))

    def _digest(self, queue: int | None, n: int) -> bytes:
        return blake2b(f"{self._seed}:{queue}:{n}".encode(), digest_size=16).digest()


class FaultPlan:
    """Faults of one device, and their `log`.

    ``faults`` are texts, mappings or `FaultSpec` as `parse_fault` takes them. Without ``seed`` it is another one each
    time; the log's first line has it. ``write`` takes the log's lines. Raises ConfigError.
    """

    def __init__(
        self,
        faults: Iterable[object] = (),
        *,
        seed: int | None = None,
        device: str = "",
        write: Callable[[str], None] | None = None,
        running: bool = True,
    ) -> None:
        self.log = FaultLog(write)
        self.running = running
        """Whether faults happen; else they are only counted."""
        specs, recorded = _expand([parse_fault(fault) for fault in faults])
        self.specs = specs
        self.seed = recorded.seed if recorded is not None else secrets.randbits(32) if seed is None else seed
        self.now: Now = lambda: None
        """What time it is; a device's core sets it."""
        self._armed: dict[str, list[Armed]] = {}
        for place, spec in enumerate(specs):
            armed = Armed(spec, place, self.seed, self.log, recorded, lambda: self.now())
            self._armed.setdefault(spec.name, []).append(armed)
        self.log.begin(device=device, seed=self.seed, faults=[spec.text for spec in specs])

    def __bool__(self) -> bool:
        """Whether there is any fault."""
        return bool(self._armed)

    def __contains__(self, name: str) -> bool:
        """Whether this fault can happen at all."""
        return name in self._armed

    def has(self, place: Place) -> bool:
        """Whether there is any fault in this part of a device."""
        return any(spec.fault.place is place for spec in self.specs)

    def hit(self, name: str, queue: int | None = None, *, possible: bool = True) -> Hit | None:
        """Count an opportunity of a fault; the hit if it happens now, of the first that were asked for if of several.

        ``queue`` is given for faults that are ``of_queue``, and for no others. Without ``possible`` it is counted, and
        does not happen: another does, or there is nothing to do wrong.
        """
        found = None
        for armed in self._armed.get(name, ()):
            hit = armed.look(queue, self.running and possible and found is None)
            found = found or hit
        return found

    def hits(self, name: str, wanted: Callable[[Mapping[str, Any]], object]) -> list[Hit]:
        """As `hit`, of all of those for whose arguments it is an opportunity, as ``wanted`` says."""
        armed = (each for each in self._armed.get(name, ()) if wanted(each.spec.arguments))
        return [hit for each in armed if (hit := each.look(None, self.running))]

    def by_themselves(self) -> list[Armed]:
        """Those that are due at times, and wait for no opportunity."""
        return [each for armed in self._armed.values() for each in armed if each.spec.happens_by_itself]

    def stop(self, name: str | None = None) -> None:
        """No fault, or none of this ``name``, happens until `start`. ConfigError for one that was not asked for."""
        self._run(False, name)

    def start(self, name: str | None = None) -> None:
        """Undo `stop` of all, or that of this ``name``. Raises ConfigError as `stop` does."""
        self._run(True, name)

    def _run(self, running: bool, name: str | None) -> None:
        event = "started" if running else "stopped"
        if name is None:
            if self.running != running:
                self.running = running
                self.log.add(event=event)
                self._skip(chain.from_iterable(self._armed.values()))
            return
        if name not in self._armed:
            raise ConfigError(f"no fault {quoted(name)} was asked for, only {', '.join(self._armed) or 'none'}")
        if any(armed.running != running for armed in self._armed[name]):
            for armed in self._armed[name]:
                armed.running = running
            self.log.add(event=event, name=name)
            self._skip(self._armed[name])

    @staticmethod
    def _skip(some: Iterable[Armed]) -> None:
        for armed in some:
            armed.skip()

    def status(self) -> str:
        """Whether faults happen, and how often each has: for people."""
        each = [
            f"{armed.spec.text} {armed.happened} times" + ("" if armed.running else ", stopped")
            for some in self._armed.values()
            for armed in some
        ]
        return f"faults {'happen' if self.running else 'are stopped'}: {'; '.join(each) or 'there are none'}"


def replay(path: str) -> FaultPlan:
    """The plan in which everything happens at the places that a log has. Raises ConfigError."""
    return FaultPlan([FaultSpec("replay", path)])


def _expand(given: list[FaultSpec]) -> tuple[list[FaultSpec], Recorded | None]:
    """The single faults, and the log that says where they happen."""
    specs: list[FaultSpec] = []
    for spec in given:
        if spec.name == "replay":
            if len(given) > 1:
                raise ConfigError(f"fault=replay:{spec.which} says all: no other fault can be beside it")
            recorded = read_log(spec.which)
            return [parse_fault(fault) for fault in recorded.faults], recorded
        if spec.name == "profile":
            if spec.which not in PROFILES:
                raise ConfigError(f"fault=profile:{spec.which}: the profiles are {', '.join(PROFILES)}")
            specs += [parse_fault(fault) for fault in PROFILES[spec.which].faults]
        else:
            specs.append(spec)
    return specs, None
