"""Oracle of the process fuzzer: what is wrong with a server process, as its neighbours and its host see it.

============  =========================================================================================================
finding       seen how
============  =========================================================================================================
``start``     a good configuration that is not served, or a mistake in one that is not one clear line
``died``      the process has ended by itself
``stopped``   a neighbour's register is not answered at all
``stall``     a neighbour's register took more than `STALL`, twice, without waits for a CPU
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
from dataclasses import dataclass

from vfiouser_virtio.testing.fuzz.process.neighbour import RoundTrips
from vfiouser_virtio.testing.fuzz.process.server import Holdings

STALL = 0.2
"""Seconds that a neighbour may wait for a register at most, on a machine where an idle server takes `USUAL`."""
USUAL = 0.0005
_LONG = 5
"""So many times `STALL` is enough once."""
# What a process may have more of than before its clients came: what is opened once and kept (eventfds of queues).
_MORE_FDS, _MORE_MAPPINGS, _MORE_BYTES = 24, 200, 48 << 20
MOST_BYTES = 192 << 20
"""Memory of its own that an attack may make a process use at any time, beyond what it had."""
_LOG_BYTES, _LOG_RATE = 128 << 10, 32 << 10
"""What may be logged at once, and then a second: each device has 10 lines a second, 100 at once."""
FORGED = "forged-line"
"""With this attackers begin a line, where they can."""
_NOT_TEXT = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


@dataclass(frozen=True, slots=True)
class ProcessFinding:
    """Fault of a server process."""

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


def of_round_trips(idle: RoundTrips, attacked: RoundTrips) -> ProcessFinding | None:
    """Whether the neighbour has been kept waiting; how long is too long depends on what an idle server took."""
    limit = STALL * max(idle.median / USUAL, 1.0)
    stalls = attacked.longer(limit)
    if len(stalls) < 2 and not any(one > _LONG * limit for one in stalls):
        return None
    shown = ", ".join(f"{one * 1e3:.0f}" for one in stalls[:5])
    return ProcessFinding(
        "stall",
        f"{len(stalls)} of {len(attacked.served)} register accesses of the neighbour's took more than "
        f"{limit * 1e3:.0f} ms: {shown} ms; {idle.median * 1e3:.2f} ms when idle",
    )


def of_holdings(before: Holdings, after: Holdings) -> ProcessFinding | None:
    """What there is too much of once all attackers have left."""
    if after.memfds:
        return ProcessFinding("mapping", f"memory of clients that left is still mapped: {', '.join(after.memfds[:8])}")
    more = {
        "file descriptors": (after.fds - before.fds, _MORE_FDS),
        "mappings": (after.mappings - before.mappings, _MORE_MAPPINGS),
        "bytes of its own memory": (after.anonymous - before.anonymous, _MORE_BYTES),
    }
    grown = [f"{count} {what} more" for what, (count, most) in more.items() if count > most]
    return ProcessFinding("growth", f"after all clients have left: {', '.join(grown)}") if grown else None


def of_peak(before: int, peak: int) -> ProcessFinding | None:
    """Whether an attack has made the process use too much memory."""
    if peak - before <= MOST_BYTES:
        return None
    return ProcessFinding("growth", f"{(peak - before) >> 20} MiB more of its own memory during the attack")


def of_stderr(said: bytes, seconds: float) -> list[ProcessFinding]:
    """What is wrong with what was logged within so long."""
    found = []
    if len(said) > _LOG_BYTES + _LOG_RATE * seconds:
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
