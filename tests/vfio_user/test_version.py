"""Version negotiation with the requests of every client we know, and of some that nobody should be."""

import json
import struct

import pytest

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.testing.raw.client import QEMU_CAPABILITIES
from vfiouser_virtio.vfio_user.server.version import Negotiated, negotiate
from vfiouser_virtio.vfio_user.wire.version import MAX_PAYLOAD


def payload(data: bytes, major: int = 0, minor: int = 0) -> bytes:
    return struct.pack("<HH", major, minor) + data


def capabilities(**keys: object) -> bytes:
    return payload(json.dumps({"capabilities": keys}, separators=(",", ":")).encode() + b"\0")


def answered(reply: bytes) -> dict[str, object]:
    assert reply[-1] == 0
    found = json.loads(reply[4:-1]).get("capabilities", {})
    assert isinstance(found, dict)
    return found


def test_qemu() -> None:
    request = payload(QEMU_CAPABILITIES.encode() + b"\0")
    assert len(request) == 214 - 16
    agreed, reply = negotiate(request)
    assert len(reply) <= len(request)
    assert reply[:4] == bytes(4)  # 0.0: QEMU refuses a higher minor
    assert answered(reply) == {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1 << 20,
        "pgsizes": 4096,
        "max_dma_maps": 28000,
    }
    assert agreed == Negotiated(minor=0, max_msg_fds=16, max_data_xfer_size=1 << 20)


def test_spdk_four_bytes_and_no_json() -> None:
    agreed, reply = negotiate(payload(b"", 0, 1))
    assert reply == payload(b"", 0, 1)
    assert agreed == Negotiated(minor=1, max_msg_fds=1, max_data_xfer_size=1 << 20)


@pytest.mark.parametrize(("theirs", "ours"), [(0, 0), (1, 1), (2, 1), (0xFFFF, 1)])
def test_the_lower_minor_wins(theirs: int, ours: int) -> None:
    agreed, reply = negotiate(payload(b"", 0, theirs))
    assert agreed.minor == ours
    assert reply == payload(b"", 0, ours)


@pytest.mark.parametrize("text", ["{}", '{"capabilities":{}}', '{"capabilities":{"unknown":[1,{"a":null}]},"x":1}'])
def test_nothing_that_we_know(text: str) -> None:
    agreed, reply = negotiate(payload(text.encode() + b"\0"))
    assert answered(reply) == {}
    assert agreed == Negotiated()


@pytest.mark.parametrize("value", [True, 1, {"supported": True}, None, [8]])
def test_a_capability_of_tomorrow_is_ignored(value: object) -> None:
    """`sparse_mmap_fds` is what the next QEMU asks for; whatever it holds, the others are answered as without it."""
    known = {"max_msg_fds": 8, "pgsizes": 4096}
    agreed, reply = negotiate(capabilities(sparse_mmap_fds=value, **known))
    assert answered(reply) == {"max_msg_fds": 16, "pgsizes": 4096}
    assert agreed == negotiate(capabilities(**known))[0]


def test_no_more_json_than_a_client_can_have_to_say() -> None:
    """1 MiB of it held up all devices of the process for 0.1 s, at each connection."""
    longest = MAX_PAYLOAD - len(payload(b"\0"))
    assert negotiate(payload(b"{}".ljust(longest) + b"\0"))[0] == Negotiated()
    with pytest.raises(PeerError, match="VERSION: payload of 0x4001 bytes, up to 0x4000 are taken") as caught:
        negotiate(payload(b"[" + b"[]," * 10_000)[:MAX_PAYLOAD] + b"\0")
    assert caught.value.fatal


def test_no_more_file_descriptors_than_linux_sends() -> None:
    assert [negotiate(capabilities(max_msg_fds=count))[0].max_msg_fds for count in (0, 253, 254, 1 << 40)] == [
        0,
        253,
        253,
        253,
    ]


def test_a_lone_nul_is_no_json() -> None:
    assert negotiate(payload(b"\0"))[1] == payload(b"")


@pytest.mark.parametrize("length", range(86, 120))
def test_the_reply_is_never_longer_than_the_request_and_keeps_what_matters_most(length: int) -> None:
    text = '{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":9,"pgsizes":1,"max_dma_maps":1}}'.ljust(length)
    request = payload(text.encode() + b"\0")
    _agreed, reply = negotiate(request)
    assert len(reply) <= len(request)
    keys = list(answered(reply))
    assert keys == ["max_msg_fds", "max_data_xfer_size", "pgsizes", "max_dma_maps"][: len(keys)]
    whole = '{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"pgsizes":4096,"max_dma_maps":65535}}'
    assert len(keys) == (4 if length >= len(whole) else 3)


def test_what_does_not_fit_is_left_out() -> None:
    request = capabilities(max_msg_fds=8, pgsizes=1)
    _agreed, reply = negotiate(request)
    assert len(reply) <= len(request)
    assert answered(reply) == {"max_msg_fds": 16}


def test_twin_socket_only_when_offered() -> None:
    wide = {"unknown": "x" * 100}
    assert not negotiate(capabilities(**wide))[0].twin_socket
    assert not negotiate(capabilities(twin_socket={"supported": False}, **wide))[0].twin_socket
    assert not negotiate(capabilities(twin_socket={}, **wide))[0].twin_socket
    assert not negotiate(capabilities(twin_socket=True, **wide))[0].twin_socket
    agreed, reply = negotiate(capabilities(twin_socket={"supported": True}, **wide))
    assert agreed.twin_socket
    assert answered(reply)["twin_socket"] == {"supported": True, "fd_index": 0}


def test_a_twin_socket_that_cannot_be_named_is_not_used() -> None:
    request = capabilities(twin_socket={"supported": True})  # the reply needs room for fd_index
    agreed, reply = negotiate(request)
    assert not agreed.twin_socket
    assert answered(reply) == {}


def test_write_multiple_only_when_allowed_and_offered() -> None:
    offer = capabilities(write_multiple=True, unknown="x" * 50)
    assert not negotiate(offer)[0].write_multiple
    agreed, reply = negotiate(offer, write_multiple=True)
    assert agreed.write_multiple
    assert answered(reply) == {"write_multiple": True}
    assert not negotiate(capabilities(write_multiple=False), write_multiple=True)[0].write_multiple
    assert not negotiate(capabilities(), write_multiple=True)[0].write_multiple


def test_the_smaller_transfer_size_wins() -> None:
    assert negotiate(capabilities(max_data_xfer_size=4096))[0].max_data_xfer_size == 4096
    assert negotiate(capabilities(max_data_xfer_size=1 << 40))[0].max_data_xfer_size == 1 << 20


@pytest.mark.parametrize(
    "request_payload",
    [
        b"",
        b"\0\0\0",
        payload(b"", major=1),
        payload(b"{}"),
        payload(b"\xff\xfe\0"),
        payload(b"{\0"),
        payload(b"{}\0\0"),
        payload(b"[]\0"),
        payload(b"3\0"),
        payload(b'{"capabilities":[]}\0'),
        payload(b"[" * 100_000 + b"\0"),
        payload(b'{"capabilities":' * 10_000 + b"\0"),
        payload(b'{"a":' + b"9" * 10_000 + b"}\0"),
        capabilities(max_msg_fds="8"),
        capabilities(max_msg_fds=8.0),
        capabilities(max_msg_fds=True),
        capabilities(max_msg_fds=-1),
        capabilities(max_data_xfer_size=0),
        capabilities(max_data_xfer_size=None),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_nonsense_is_the_clients_fault(request_payload: bytes) -> None:
    with pytest.raises(PeerError, match="VERSION: ") as caught:
        negotiate(request_payload)
    assert caught.value.fatal
    assert len(str(caught.value)) < 200
