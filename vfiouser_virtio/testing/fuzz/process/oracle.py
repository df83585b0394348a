"""Oracle of the process fuzzer: what is wrong with a server process, as its neighbours and its host see it.

============  =========================================================================================================
finding       seen how
============  =========================================================================================================
``start``     a good configuration that is not served, or a mistake in one that is not one clear line
``died``      the process has ended by itself
``stopped``   a neighbour's register is not answered at all
``stall``     a neighbour's register took more than `ServerBudgets.stall`, twice, without waits for a CPU
``neighbour`` a neighbour's request came back wrong, or its memory has changed
``mapping``   memory of a client that left is still mapped, or was written by what another client did
``refused``   the next client of a device, or a new client of another one, is not served
``growth``    file descriptors, mappings or memory: more than before, or too much at any time; CPU time for nothing
``log``       more bytes a second than a disk should be filled with
``text``      a client's bytes that command a terminal, or begin a line
``bug``       a traceback
``silent``    nothing is said of a device that waits for what never comes
``file``      a file was written that is not the server's, or is for everybody to read
``end``       SIGTERM has not ended it
============  =========================================================================================================
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from vfiouser_virtio.testing.fuzz.process.neighbour import RoundTrips
from vfiouser_virtio.testing.fuzz.process.server import Holdings

USUAL = 0.0005
_LONG = 5
"""So many times `ServerBudgets.stall` is enough once."""
FORGED = "forged-line"
"""With this attackers begin a line, where they can."""
_NOT_TEXT = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


@dataclass(frozen=True, slots=True)
class ServerBudgets:
    """Most that an attack may cost. Memory is in bytes, and the process's own."""

    stall: float = 0.2
    """Seconds that a neighbour may wait for a register, on a machine where an idle server takes `USUAL`."""
    fds: int = 24
    """Descriptors more than before its clients came: what is opened once and kept (eventfds of queues)."""
    mappings: int = 200
    """Mappings more than before."""
    memory: int = 48 << 20
    """Memory more than before."""
    peak: int = 192 << 20
    """Memory more than before at any time of the attack."""
    log: int = 128 << 10
    """Bytes that may be logged at once: each device has 10 lines a second, 100 at once."""
    log_rate: int = 32 << 10
    """And then a second."""

    @staticmethod
    def parse(settings: Iterable[str]) -> "ServerBudgets":
        """Of ``name=number`` each. Raises ValueError."""
        values: dict[str, Any] = {}
        known = {field.name: field.type for field in fields(ServerBudgets)}
        for setting in settings:
            name, _, number = setting.partition("=")
            if name not in known:
                raise ValueError(f"{setting}: there is no budget {name!r}; there are {', '.join(known)}")
            try:
                values[name] = float(number) if known[name] in (float, "float") else int(number)
            except ValueError:
                raise ValueError(f"{setting}: {number!r} is no {'number' if name == 'stall' else 'integer'}") from None
            if not 0 <= values[name] < 1e15:
                raise ValueError(f"{setting}: a budget is 0 or more")
        return replace(ServerBudgets(), **values)


DEFAULT_BUDGETS = ServerBudgets()


@dataclass(frozen=True, slots=True)
class ProcessFinding:
    """Fault of a server process."""

    kind: str
    what: str
    once: bool = False
    """It did not come again when its case was run again."""

    def __str__(self) -> str:
        return f"{self.kind}{' (not reproduced)' if self.once else ''}: {self.what}"


def of_round_trips(
    idle: RoundTrips, attacked: RoundTrips, budgets: ServerBudgets = DEFAULT_BUDGETS
) -> ProcessFinding | None:
    """Whether the neighbour has been kept waiting; how long is too long depends on what an idle server took."""
    limit = budgets.stall * max(idle.median / USUAL, 1.0)
    stalls = attacked.longer(limit)
    if len(stalls) < 2 and not any(one > _LONG * limit for one in stalls):
        return None
    shown = ", ".join(f"{one * 1e3:.0f}" for one in stalls[:5])
    return ProcessFinding(
        "stall",
        f"{len(stalls)} of {len(attacked.served)} register accesses of the neighbour's took more than "
        f"{limit * 1e3:.0f} ms: {shown} ms; {idle.median * 1e3:.2f} ms when idle",
    )


def of_holdings(before: Holdings, after: Holdings, budgets: ServerBudgets = DEFAULT_BUDGETS) -> ProcessFinding | None:
    """What there is too much of once all attackers have left."""
    if after.memfds:
        return ProcessFinding("mapping", f"memory of clients that left is still mapped: {', '.join(after.memfds[:8])}")
    more = {
        "file descriptors": (after.fds - before.fds, budgets.fds),
        "mappings": (after.mappings - before.mappings, budgets.mappings),
        "bytes of its own memory": (after.anonymous - before.anonymous, budgets.memory),
    }
    grown = [f"{count} {what} more" for what, (count, most) in more.items() if count > most]
    return ProcessFinding("growth", f"after all clients have left: {', '.join(grown)}") if grown else None


def of_peak(before: int, peak: int, budgets: ServerBudgets = DEFAULT_BUDGETS) -> ProcessFinding | None:
    """Whether an attack has made the process use too much memory."""
    if peak - before <= budgets.peak:
        return None
    return ProcessFinding("growth", f"{(peak - before) >> 20} MiB more of its own memory during the attack")


def of_stderr(said: bytes, seconds: float, budgets: ServerBudgets = DEFAULT_BUDGETS) -> list[ProcessFinding]:
    """What is wrong with what was logged within so long."""
    found = []
    if len(said) > budgets.log + budgets.log_rate * seconds:
        found.append(ProcessFinding("log", f"{len(said)} bytes logged in {seconds:.1f} s"))
    if hostile := _NOT_TEXT.search(said):
        around = said[max(hostile.start() - 40, 0) : hostile.end() + 20]
        found.append(ProcessFinding("text", f"control characters of a client in the log: {around!r}"))
    if re.search(rb"^" + FORGED.encode(), said, re.MULTILINE):
        found.append(ProcessFinding("text", "a line of the log begins with what a client has sent"))
    if b"Traceback (most recent call last)" in said:
        at = said.index(b"Traceback (most recent call last)")
        found.append(ProcessFinding("bug", said[at:][:4000].decode(errors="replace")))
    return found


def of_refusal(status: int | None, said: bytes) -> ProcessFinding | None:
    """What is wrong with the end of a command whose configuration is a mistake; ``status`` None: it has not ended."""
    if status is None:
        return ProcessFinding("start", "a mistake in its configuration does not end the command")
    text = said.decode(errors="replace")
    if "Traceback (most recent call last)" in text:
        return ProcessFinding("start", f"a traceback for a mistake in the configuration: {text[-300:]}")
    if status <= 0:
        return ProcessFinding("start", f"a mistake in the configuration ends the command with status {status}")
    lines = text.strip().splitlines()
    if not 1 <= len(lines) <= 2 or len(text) > 2000:
        return ProcessFinding("start", f"{len(lines)} lines and {len(text)} bytes for a mistake in the configuration")
    return None
