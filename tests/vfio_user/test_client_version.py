"""What a client proposes byte for byte, and which answers it takes."""

import errno
import json
import struct
from dataclasses import replace

import pytest

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.testing.raw.client import QEMU_CAPABILITIES
from vfiouser_virtio.vfio_user import QEMU_VERSION, SPDK_VERSION, TWIN_VERSION, VersionProposal
from vfiouser_virtio.vfio_user.client.version import parse_version
from vfiouser_virtio.vfio_user.server.version import negotiate
from vfiouser_virtio.vfio_user.wire.version import MAX_PAYLOAD


def answer(capabilities: object = None, *, major: int = 0, minor: int = 0, data: bytes | None = None) -> bytes:
    if data is None:
        data = b"" if capabilities is None else json.dumps({"capabilities": capabilities}).encode() + b"\0"
    return struct.pack("<HH", major, minor) + data


def test_qemus_bytes() -> None:
    assert QEMU_VERSION.payload() == bytes(4) + QEMU_CAPABILITIES.encode() + b"\0"
    assert 16 + len(QEMU_VERSION.payload()) == 214


def test_spdks_bytes() -> None:
    assert SPDK_VERSION.payload() == b"\0\0\1\0"


@pytest.mark.parametrize(
    ("proposal", "payload"),
    [
        (VersionProposal(major=2, minor=3, data=b"x"), b"\2\0\3\0x"),
        (VersionProposal(capabilities={}), b'\0\0\1\0{"capabilities": {}}\0'),
        (VersionProposal(capabilities={"a": [1]}), b'\0\0\1\0{"capabilities": {"a": [1]}}\0'),
        (SPDK_VERSION.with_capabilities(b=True), b'\0\0\1\0{"capabilities": {"b": true}}\0'),
        (VersionProposal(capabilities={"a": 1, "b": 2}).with_capabilities(a=None, b=3, c=4), None),
    ],
)
def test_any_bytes_can_be_proposed(proposal: VersionProposal, payload: bytes | None) -> None:
    assert proposal.payload() == (payload or b'\0\0\1\0{"capabilities": {"b": 3, "c": 4}}\0')


def test_changing_a_proposal_leaves_the_original() -> None:
    before = QEMU_VERSION.payload()
    QEMU_VERSION.with_capabilities(max_msg_fds=1)
    assert QEMU_VERSION.payload() == before


def test_what_is_absent_has_the_specifications_default() -> None:
    for payload in (answer(), answer({})):
        version = parse_version(VersionProposal(), payload)
        assert (version.major, version.minor, version.capabilities) == (0, 0, {})
        assert (version.max_msg_fds, version.max_data_xfer_size, version.max_dma_maps) == (1, 1 << 20, 65535)
        assert (version.pgsizes, version.write_multiple, version.twin_fd_index) == (4096, False, None)


def test_what_the_server_says_is_taken() -> None:
    found = {"max_msg_fds": 3, "max_data_xfer_size": 4096, "write_multiple": True, "unknown": {"x": 1}}
    version = parse_version(VersionProposal(), answer(found, minor=1))
    assert (version.minor, version.max_msg_fds, version.max_data_xfer_size) == (1, 3, 4096)
    assert version.write_multiple
    assert version.capabilities == found


@pytest.mark.parametrize("value", [True, 1, {"supported": True}, None, [8]])
def test_a_capability_of_tomorrow_is_ignored(value: object) -> None:
    """`sparse_mmap_fds`, which no released server has yet: it is there to be looked at, and means nothing."""
    version = parse_version(VersionProposal(), answer({"sparse_mmap_fds": value, "max_msg_fds": 3}))
    assert version == replace(
        parse_version(VersionProposal(), answer({"max_msg_fds": 3})), capabilities=version.capabilities
    )
    assert version.capabilities["sparse_mmap_fds"] == value


@pytest.mark.parametrize("proposal", [VersionProposal(), QEMU_VERSION, SPDK_VERSION, TWIN_VERSION])
def test_our_own_server_is_understood(proposal: VersionProposal) -> None:
    agreed, payload = negotiate(proposal.payload(), write_multiple=True)
    version = parse_version(proposal, payload)
    assert version.minor == agreed.minor
    assert version.write_multiple == agreed.write_multiple
    assert (version.twin_fd_index is not None) == agreed.twin_socket


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"\0\0\0", "4 or more"),
        (answer(major=1), "0x1.0x0"),
        (answer(minor=2), "0x0.0x2"),
        (answer(data=b"{}"), "does not end with a NUL"),
        (answer(data=b"{\0"), "not JSON"),
        (answer(data=b"[" * 10_000 + b"\0"), "not JSON"),
        (answer(data=b"{}".ljust(MAX_PAYLOAD - 5) + b"\0" * 2), "0x4001 bytes, up to 0x4000 are taken"),
        (answer(data=b"\xff\0"), "not JSON"),
        (answer(data=b"[]\0"), "not an object"),
        (answer([]), "not an object"),
        (answer({"max_msg_fds": -1}), "max_msg_fds"),
        (answer({"max_msg_fds": True}), "max_msg_fds"),
        (answer({"max_data_xfer_size": "1"}), "max_data_xfer_size"),
        (answer({"pgsizes": 4096.0}), "pgsizes"),
        (answer({"write_multiple": 1}), "write_multiple"),
        (answer({"twin_socket": True}), "twin_socket"),
        (answer({"twin_socket": {"supported": 1}}), "twin_socket"),
        (answer({"twin_socket": {"supported": True}}), "fd_index"),
        (answer({"twin_socket": {"supported": True, "fd_index": -1}}), "fd_index"),
    ],
)
def test_what_no_server_may_answer(payload: bytes, text: str) -> None:
    with pytest.raises(PeerError, match=text) as caught:
        parse_version(TWIN_VERSION, payload)
    assert caught.value.fatal
    assert caught.value.errno == errno.EPROTO


def test_a_twin_socket_must_have_been_proposed() -> None:
    with pytest.raises(PeerError, match="not proposed"):
        parse_version(QEMU_VERSION, answer({"twin_socket": {"supported": True, "fd_index": 0}}))
    assert parse_version(QEMU_VERSION, answer({"twin_socket": {"supported": False}})).twin_fd_index is None
