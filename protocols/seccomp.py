"""seccomp(2) filters: classic BPF programs over one system call; names of linux/seccomp.h, bpf_common.h and audit.h."""

from enum import IntEnum, IntFlag

from construct import Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec

SET_MODE_FILTER = 1
"""Operation of seccomp(2)."""
PR_GET_SECCOMP = 21
"""Of prctl(2): 0, or EINVAL from a kernel without seccomp."""
MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS of linux/bpf_common.h."""


class FilterFlags(IntFlag):
    """``flags`` of `SET_MODE_FILTER`."""

    TSYNC = 1
    """For all threads of the process, or, if one cannot have it, for none."""


class Action(IntEnum):
    """Result of a filter; that of ERRNO has the number in its lower 16 bits."""

    KILL_PROCESS = 0x8000_0000
    ERRNO = 0x0005_0000
    ALLOW = 0x7FFF_0000


class Bpf(IntEnum):
    """Codes of the instructions that the filters here have, each of several bits that are OR-ed in C."""

    LD = 0x20
    """A = the 32 bits at offset ``k`` of `DATA`: BPF_LD | BPF_W | BPF_ABS."""
    AND = 0x54
    """A &= k."""
    JA = 0x05
    """Skip ``k`` instructions."""
    JEQ = 0x15
    """Skip ``jt`` instructions where A == k, else ``jf``."""
    JGT = 0x25
    JGE = 0x35
    RET = 0x06
    """End; the result is ``k``."""


class Arch(IntEnum):
    """``arch`` of a system call, by the machine's name: AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64."""

    x86_64 = 0xC000_003E
    aarch64 = 0xC000_00B7


X32_BIT = 0x4000_0000
"""In the numbers of x32's system calls, which have the arch of x86_64: __X32_SYSCALL_BIT of asm/unistd.h."""

# struct sock_filter: one instruction.
INSTRUCTION = Struct("code" / Int16ul, "jt" / Int8ul, "jf" / Int8ul, "k" / Int32ul)
INSTRUCTION_CODEC = codec(INSTRUCTION)
# struct seccomp_data: what a filter sees.
DATA = Struct("nr" / Int32ul, "arch" / Int32ul, "instruction_pointer" / Int64ul, "args" / Int64ul[6])
