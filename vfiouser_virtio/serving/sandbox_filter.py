"""Assembler of a seccomp filter from rules: which system calls are let through, and with which arguments.

::

    arch is another one, or x32 ──▶ kill        the numbers below would mean other calls
    number with conditions ──▶ arguments fit ──▶ allow, else EPERM
    number in a range ──▶ allow
    number ≥ 424 ──▶ ENOSYS                     a C library then does without, as with an older kernel
    anything else ──▶ EPERM
"""

import ctypes
import errno
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.seccomp import (
    DATA,
    INSTRUCTION_CODEC,
    MAX_INSTRUCTIONS,
    SET_MODE_FILTER,
    X32_BIT,
    Action,
    Arch,
    Bpf,
    FilterFlags,
)
from vfiouser_virtio.protocols.system_calls import FIRST_COMMON, NR_SECCOMP

_FIELDS = offsets(DATA)
_NR, _ARCH, _ARGS = (_FIELDS[name][0] for name in ("nr", "arch", "args"))
_WORD = 0xFFFF_FFFF
_EPERM = Action.ERRNO | errno.EPERM
_ENOSYS = Action.ERRNO | errno.ENOSYS

Instruction = tuple[int, int, int, int]
"""code, jt, jf, k"""


@dataclass(frozen=True, slots=True)
class CallArgument:
    """Condition on an argument of a call: of the bits in ``mask`` it has the value ``value``.

    An argument that is an int in C has 32 bits: the kernel does not look at the others, and so the mask must not.
    """

    index: int
    value: int
    mask: int = _WORD


Rules = Mapping[int, Sequence[Sequence[CallArgument]]]
"""By number of the call: alternatives, each of conditions that must all hold; ``[()]`` allows it in any case."""

ANY_ARGUMENTS: Sequence[Sequence[CallArgument]] = [()]
WHOLE = (1 << 64) - 1
"""Mask of an argument that is a pointer or a long."""


def assemble(arch: Arch, rules: Rules) -> bytes:
    """The filter as an array of struct sock_filter, in the machine's (little-endian) order."""
    program: list[Instruction] = [
        (Bpf.LD, 0, 0, _ARCH),
        (Bpf.JEQ, 1, 0, arch),
        (Bpf.RET, 0, 0, Action.KILL_PROCESS),
        (Bpf.LD, 0, 0, _NR),
    ]
    if arch == Arch.x86_64:
        program += [(Bpf.JGE, 0, 1, X32_BIT), (Bpf.RET, 0, 0, Action.KILL_PROCESS)]
    plain = {number for number, alternatives in rules.items() if any(not each for each in alternatives)}
    for number in sorted(rules.keys() - plain):
        program += _conditional(number, rules[number])
    for first, last in _ranges(plain):
        program += [(Bpf.JGE, 0, 2, first), (Bpf.JGT, 1, 0, last), (Bpf.RET, 0, 0, Action.ALLOW)]
    program += [(Bpf.JGE, 0, 1, FIRST_COMMON), (Bpf.RET, 0, 0, _ENOSYS), (Bpf.RET, 0, 0, _EPERM)]
    assert len(program) <= MAX_INSTRUCTIONS
    return b"".join(INSTRUCTION_CODEC.pack(*instruction) for instruction in program)


def install_filter(program: bytes) -> None:
    """All threads of this process are behind the filter from now on, for good. no_new_privs must be set.

    Raises OSError where the kernel refuses, also because a thread has a filter that this one has not.
    """
    buffer = ctypes.create_string_buffer(program, len(program))

    class _Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    argument = _Program(len(program) // INSTRUCTION_CODEC.size, ctypes.addressof(buffer))
    result = libc.syscall(
        ctypes.c_long(NR_SECCOMP[platform.machine()]),
        ctypes.c_ulong(SET_MODE_FILTER),
        ctypes.c_ulong(FilterFlags.TSYNC),
        ctypes.byref(argument),
    )
    if result > 0:  # seccomp(2): the number of a thread, and errno is not set
        raise OSError(errno.EBUSY, f"thread {result} has a filter of its own already")
    if result:
        raise last_error()


def _conditional(number: int, alternatives: Sequence[Sequence[CallArgument]]) -> list[Instruction]:
    """From the number in A: a result where it is this call, else past it, with A as it was."""
    body: list[Instruction] = []
    for conditions in alternatives:
        tests = [test for condition in conditions for test in _tests(condition)]
        body += _all_of(tests)
    body.append((Bpf.RET, 0, 0, _EPERM))
    return [(Bpf.JEQ, 1, 0, number), (Bpf.JA, 0, 0, len(body)), *body]


def _tests(condition: CallArgument) -> list[tuple[int, int, int]]:
    """(offset, mask, value) of the 32-bit words that are compared."""
    at = _ARGS + 8 * condition.index
    halves = [
        (at, condition.mask & _WORD, condition.value & _WORD),
        (at + 4, condition.mask >> 32, condition.value >> 32),
    ]
    return [half for half in halves if half[1]]


def _all_of(tests: Sequence[tuple[int, int, int]]) -> list[Instruction]:
    """ALLOW where all are true, else past it."""
    made: list[Instruction] = [(Bpf.RET, 0, 0, Action.ALLOW)]
    for offset, mask, value in reversed(tests):
        masked = [(int(Bpf.AND), 0, 0, mask)] if mask != _WORD else []
        made = [(Bpf.LD, 0, 0, offset), *masked, (Bpf.JEQ, 0, len(made), value), *made]
    return made


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
