"""`protocols.io_uring` against linux/io_uring.h."""

import pytest
from support.uapi import defines, source, struct_layout

from vfiouser_virtio.protocols import io_uring
from vfiouser_virtio.protocols.codec import Schema, offsets

HEADER = "linux/io_uring.h"


@pytest.mark.parametrize(
    ("schema", "struct"),
    [
        (io_uring.CQE, "io_uring_cqe"),
        (io_uring.PARAMS, "io_uring_params"),
        (io_uring.RESTRICTION, "io_uring_restriction"),
    ],
)
def test_layout(schema: Schema, struct: str) -> None:
    theirs = struct_layout(HEADER, struct)
    ours = offsets(schema)
    shared = set(ours) & set(theirs)
    assert len(shared) >= 3
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_submissions() -> None:
    ours = offsets(io_uring.SQE)
    assert io_uring.SQE.sizeof() == 64
    assert (ours["off"], ours["addr"], ours["len"], ours["op_flags"], ours["user_data"]) == (
        (8, 8),
        (16, 8),
        (24, 4),
        (28, 4),
        (32, 8),
    )


def test_numbers() -> None:
    linux = defines(HEADER)
    assert linux["IORING_OFF_SQES"] == io_uring.OFF_SQES
    assert linux["IORING_FSYNC_DATASYNC"] == io_uring.FsyncFlags.DATASYNC
    for flag in io_uring.SetupFlags:
        assert linux[f"IORING_SETUP_{flag.name}"] == flag
    assert linux["IORING_REGISTER_RESTRICTIONS"] == io_uring.RegisterOp.RESTRICTIONS
    assert linux["IORING_REGISTER_ENABLE_RINGS"] == io_uring.RegisterOp.ENABLE_RINGS
    for restriction in io_uring.RestrictionOp:
        assert linux[f"IORING_RESTRICTION_{restriction.name}"] == restriction
    for feature in io_uring.Features:
        assert linux[f"IORING_FEAT_{feature.name}"] == feature
    names = [name.strip() for name in source(HEADER).split("enum io_uring_op {")[1].split("}")[0].split(",")]
    for op in io_uring.Op:
        assert names[op] == f"IORING_OP_{op.name}"
