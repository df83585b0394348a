"""Verdict on a case, from what the guest has said."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from evil_matrix.exercises import WRONG


class Outcome(Enum):
    """Outcome of a case: the worst that has happened."""

    SURVIVES = "survives"
    ERROR = "error"
    WRONG = "wrong"
    HANG = "hang"
    OOPS = "oops"
    REFUSED = "refused"

    @property
    def means(self) -> str:
        """Its definition."""
        return _MEANINGS[self]


_MEANINGS = {
    Outcome.SURVIVES: "the exercise ends with its right result",
    Outcome.ERROR: "the guest has seen an error (EIO, a probe that failed, no device), and its kernel is sane",
    Outcome.WRONG: "the exercise ends with a wrong result, and nothing has said so",
    Outcome.HANG: "the exercise does not come to an end, and the kernel says nothing worse",
    Outcome.OOPS: "the kernel has crashed, or a part of it: BUG, Oops, general protection fault, panic, KASAN",
    Outcome.REFUSED: "QEMU does not take the device: no guest sees it",
}

# "BUG: soft lockup" and "BUG: workqueue lockup" tell of a hang, however they are spelled.
_OOPS = re.compile(
    r"\bBUG: (?!soft lockup|workqueue lockup)|\bkernel BUG at |\bOops: |general protection fault|Kernel panic"
    r"|invalid opcode: |stack segment: |double fault"
)
_WARNING = re.compile(r"\bWARNING: |\bUBSAN: |nobody cared")
_STAMP = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\] ?(?:\[ *[TC]\d+\] ?)?")
_LEVEL = re.compile(r"^<(\d+)>")
# Frames that say only that something waits.
_WAITING = re.compile(
    r"^(__)?(io_)?schedule|^wait_for_|^__wait_for|^do_wait|^msleep|^usleep|^schedule_|^__flush_work|^context_switch"
    r"|^bit_wait|^out_of_line_wait|^__wait_on_bit|^folio_wait|^prepare_to_wait|^rwsem_|^down_|^__down|^mutex_lock"
    r"|^__mutex_lock|^wait_on|^do_nanosleep|^hrtimer|^clock_nanosleep|^kernel_wait|^(anon_)?pipe_read|^vfs_read|^ksys_read|^vfs_write|^ksys_write|^__do_sys_wait|^__x64_sys|^x64_sys|^do_syscall|^entry_SYSCALL"
)
# About this machine, which may be busy, and not about a device.
_NOISE = re.compile(r"hrtimer: interrupt took|clocksource|perf: interrupt took|rcu: INFO|workqueue: .* hogged CPU")
# A CPU is told of only where it is in a driver of virtio: a shell that waits has it busy, too.
_DRIVER = re.compile(r"\b(vp|vring|virt\w*)_\w+\+0x")
# Frames of a warning that only say what was called wrongly.
_CALLED = re.compile(r"alloc|ubsan|^dump_stack")
# Of the machine that has built the kernel.
_BUILT_IN = re.compile(r"/build/\S*?/linux-[^/]*/")
# What a warning says beside its first line.
_TRACE = re.compile(r"-+\[ cut here \]-+\n.*?---\[ end trace [0-9a-f ]*\]---", re.DOTALL)
CPU = "a CPU"
NO_ANSWER = "the whole guest does not answer"
MAX_SAID = 3


@dataclass(frozen=True, slots=True)
class Seen:
    """Record of what was seen of a guest."""

    status: int | None
    """Of the exercise; None where it has not ended."""
    output: str = ""
    """What it has printed."""
    kernel: str = ""
    """The kernel's log since before the device came (``dmesg -r``), and what was on its console."""
    stuck: str = ""
    """What hangs where, from `guest.WHERE`; where it did not end."""


@dataclass(frozen=True, slots=True)
class CaseVerdict:
    """Verdict on a case."""

    outcome: Outcome
    warned: bool
    """The kernel has said WARNING, whatever else."""
    said: tuple[str, ...]
    """First lines that say why."""


def classify(seen: Seen) -> CaseVerdict:
    """What has come of it."""
    lines = [_STAMP.sub("", line) for line in seen.kernel.splitlines()]
    crash = _first(lines, _OOPS)
    warning = _first(lines, _WARNING)
    if crash:
        outcome, said = Outcome.OOPS, crash
    elif seen.status is None:
        outcome, said = Outcome.HANG, [*_complaints(seen.kernel)[:1], *where(seen.stuck)]
    elif seen.status == WRONG:
        outcome, said = Outcome.WRONG, _last(seen.output)
    elif seen.status:
        outcome, said = Outcome.ERROR, [*_complaints(seen.kernel)[:2], *_last(seen.output)]
    else:
        outcome, said = Outcome.SURVIVES, _complaints(seen.kernel)
    if warning and not crash:
        said = [*warning, *said]
    return CaseVerdict(outcome, bool(warning), tuple(line[:200] for line in said[:MAX_SAID]))


def _first(lines: list[str], pattern: re.Pattern[str]) -> list[str]:
    """The first line with the pattern, and where in the code that was."""
    for number, line in enumerate(lines):
        if pattern.search(line):
            end = next((n for n in range(number, len(lines)) if "</TASK>" in lines[n]), number + 40)
            told = [name for name in _telling(lines[number + 1 : end], most=9) if not _CALLED.search(name)][:3]
            return [_BUILT_IN.sub("", line.strip()), *([f"in {' < '.join(dict.fromkeys(told))}"] if told else [])]
    return []


def _last(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip()][-1:]


def _complaints(kernel: str) -> list[str]:
    """Errors and warnings of the kernel, each once."""
    found = [
        line for line in _TRACE.sub("", kernel).splitlines() if (level := _LEVEL.match(line)) and int(level[1]) <= 4
    ]
    texts = dict.fromkeys(_STAMP.sub("", line).strip() for line in found)
    return [text for text in texts if text and not _NOISE.search(text)]


def where(stuck: str) -> list[str]:
    """What hangs where: a line for each task, or else each CPU, with its innermost frames that say something."""
    found: dict[str, None] = {}
    for block in re.split(r"^== ", stuck, flags=re.MULTILINE)[1:]:
        title, *frames = block.splitlines()
        if title == NO_ANSWER:
            found[title] = None
        elif (not block.startswith(CPU) or _DRIVER.search(block)) and (told := _telling(frames)):
            found[f"{title.strip()}: {' < '.join(told)}"] = None
    return [line for line in found if not line.startswith(CPU)] or list(found)


def _telling(frames: Iterable[str], most: int = 3) -> list[str]:
    """Functions of a stack, ``[<0>] name+0x1/0x2``, but those that only wait, and what is not sure."""
    sure = (frame for frame in frames if " ? " not in frame)
    names = [match[1] for frame in sure if (match := re.search(r"([A-Za-z_][\w.]*)\+0x", frame))]
    return [name for name in names if not _WAITING.search(name)][:most]
