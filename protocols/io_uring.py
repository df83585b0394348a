"""io_uring(7): structures and constants of the rings that the kernel and a program share; names of linux/io_uring.h."""

from enum import IntEnum, IntFlag

from construct import Int8ul, Int16ul, Int32sl, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec


class Op(IntEnum):
    """``opcode`` of a submission."""

    READV = 1
    WRITEV = 2
    FSYNC = 3
    ASYNC_CANCEL = 14


class SqeFlags(IntFlag):
    """``flags`` of a submission."""

    ASYNC = 1 << 4
    """Not to be tried within io_uring_enter(): a thread of the kernel's does it from the start."""


class FsyncFlags(IntFlag):
    """``op_flags`` of `Op.FSYNC`."""

    DATASYNC = 1


class SetupFlags(IntFlag):
    """``flags`` of io_uring_setup()."""

    CQSIZE = 1 << 3
    """``cq_entries`` says how many completions there is room for."""
    CLAMP = 1 << 4
    R_DISABLED = 1 << 6
    """It takes no requests until `RegisterOp.ENABLE_RINGS`; Linux 5.10."""


class RegisterOp(IntEnum):
    """``opcode`` of io_uring_register()."""

    RESTRICTIONS = 11
    ENABLE_RINGS = 12


class RestrictionOp(IntEnum):
    """``opcode`` of a `RESTRICTION`: what its value allows."""

    SQE_OP = 1
    SQE_FLAGS_ALLOWED = 2


class Features(IntFlag):
    """``features`` that the kernel answers io_uring_setup() with."""

    SINGLE_MMAP = 1 << 0
    """Both rings are in one mapping."""
    NODROP = 1 << 1
    """Completions that find no room wait in the kernel."""


# Offsets for mmap() of a ring's file descriptor.
OFF_SQ_RING, OFF_SQES = 0, 0x1000_0000

# struct io_uring_sqe; of its unions the members that are used here, the rest as padding.
SQE = Struct(
    "opcode" / Int8ul,
    "flags" / Int8ul,
    "ioprio" / Int16ul,
    "fd" / Int32sl,
    "off" / Int64ul,
    "addr" / Int64ul,
    "len" / Int32ul,
    "op_flags" / Int32ul,
    "user_data" / Int64ul,
    "rest" / Int64ul[3],
)
CQE = Struct("user_data" / Int64ul, "res" / Int32sl, "flags" / Int32ul)
# struct io_uring_restriction; ``value`` is its union of register_op, sqe_op and sqe_flags.
RESTRICTION = Struct("opcode" / Int16ul, "value" / Int8ul, "resv" / Int8ul, "resv2" / Int32ul[3])
RESTRICTION_CODEC = codec(RESTRICTION)
SQE_CODEC = codec(SQE)
CQE_CODEC = codec(CQE)

_SQ_OFFSETS = Struct(
    "head" / Int32ul,
    "tail" / Int32ul,
    "ring_mask" / Int32ul,
    "ring_entries" / Int32ul,
    "flags" / Int32ul,
    "dropped" / Int32ul,
    "array" / Int32ul,
    "resv1" / Int32ul,
    "user_addr" / Int64ul,
)
_CQ_OFFSETS = Struct(
    "head" / Int32ul,
    "tail" / Int32ul,
    "ring_mask" / Int32ul,
    "ring_entries" / Int32ul,
    "overflow" / Int32ul,
    "cqes" / Int32ul,
    "flags" / Int32ul,
    "resv1" / Int32ul,
    "user_addr" / Int64ul,
)
# struct io_uring_params: in with ``flags`` and ``cq_entries``, out with all of it.
PARAMS = Struct(
    "sq_entries" / Int32ul,
    "cq_entries" / Int32ul,
    "flags" / Int32ul,
    "sq_thread_cpu" / Int32ul,
    "sq_thread_idle" / Int32ul,
    "features" / Int32ul,
    "wq_fd" / Int32ul,
    "resv" / Int32ul[3],
    "sq_off" / _SQ_OFFSETS,
    "cq_off" / _CQ_OFFSETS,
)
