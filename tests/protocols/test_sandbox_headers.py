"""`protocols.seccomp`, `.landlock` and `.system_calls` against Linux's headers."""

import re
from pathlib import Path

import pytest
from support.uapi import defines, source, struct_layout, uapi_include

from vfiouser_virtio.protocols import landlock, seccomp
from vfiouser_virtio.protocols.codec import Schema, offsets
from vfiouser_virtio.protocols.system_calls import FIRST_COMMON, NR_SECCOMP, NUMBERS


@pytest.mark.parametrize(
    ("schema", "header", "struct"),
    [
        (seccomp.DATA, "linux/seccomp.h", "seccomp_data"),
        (seccomp.INSTRUCTION, "linux/filter.h", "sock_filter"),
        (landlock.PATH_BENEATH, "linux/landlock.h", "landlock_path_beneath_attr"),
    ],
)
def test_layout(schema: Schema, header: str, struct: str) -> None:
    assert offsets(schema) == struct_layout(header, struct)


def test_constants() -> None:
    filters = defines("linux/seccomp.h")
    assert filters["SECCOMP_SET_MODE_FILTER"] == seccomp.SET_MODE_FILTER
    assert filters["SECCOMP_FILTER_FLAG_TSYNC"] == seccomp.FilterFlags.TSYNC
    for action in seccomp.Action:
        assert filters[f"SECCOMP_RET_{action.name}"] == action
    bpf = defines("linux/bpf_common.h")
    assert bpf["BPF_LD"] | bpf["BPF_W"] | bpf["BPF_ABS"] == seccomp.Bpf.LD
    assert bpf["BPF_ALU"] | bpf["BPF_AND"] == seccomp.Bpf.AND
    for name in ("JA", "JEQ", "JGT", "JGE"):
        assert bpf["BPF_JMP"] | bpf[f"BPF_{name}"] == seccomp.Bpf[name]
    assert bpf["BPF_RET"] == seccomp.Bpf.RET
    assert bpf["BPF_MAXINSNS"] == seccomp.MAX_INSTRUCTIONS
    files = {name: value for name, value in defines("linux/landlock.h").items() if "_ACCESS_FS_" in name}
    assert len(files) >= 14
    for name, value in files.items():
        assert landlock.AccessFs[name.removeprefix("LANDLOCK_ACCESS_FS_")] == value


def test_rights_by_abi() -> None:
    for abi, count in ((1, 13), (2, 14), (3, 15), (4, 15), (5, 16), (7, 16)):
        assert landlock.known_rights(abi)[0].bit_count() == count


def test_numbers_of_aarch64() -> None:
    check("aarch64", "asm-generic/unistd.h")


def test_numbers_of_x86_64() -> None:
    # Where it is: in a folder of the machine's on Debian.
    header = next(uapi_include().rglob("asm/unistd_64.h"), None)
    if header is None:
        pytest.skip("the headers are of another machine")
    check("x86_64", header)


def check(machine: str, header: str | Path) -> None:
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", source(header))
    linux = {name: int(number) for name, number in found}
    linux.setdefault("newfstatat", linux.get("fstatat", -1))
    assert {name: linux[name] for name in NUMBERS[machine]} == NUMBERS[machine]
    assert linux["seccomp"] == NR_SECCOMP[machine]
    assert linux["pidfd_send_signal"] == FIRST_COMMON
    assert linux["landlock_create_ruleset"] == landlock.NR_CREATE_RULESET
    assert linux["landlock_restrict_self"] == landlock.NR_RESTRICT_SELF
