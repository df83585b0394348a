"""Version negotiation ("VFIO_USER_VERSION"): a pure function from the client's payload to ours."""

import json
from dataclasses import dataclass
from typing import Any

from vfiouser_virtio.device_log import quoted
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import VERSION, VERSION_DATA_DEFAULTS
from vfiouser_virtio.vfio_device import MAX_DMA_MAPS, Buffer
from vfiouser_virtio.vfio_user.connection import MAX_DATA_XFER_SIZE, MAX_MSG_FDS

MAJOR = 0
MINOR = 1
"""The newest minor we speak. Nothing but the number differs from 0.0, and QEMU, which sends 0, refuses a 1."""

_FIXED_SIZE = 4  # major and minor


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What both sides may do from here on."""

    minor: int = 0
    max_msg_fds: int = 1
    """How many fds the client takes in one message."""
    max_data_xfer_size: int = MAX_DATA_XFER_SIZE
    """How many bytes the client takes in one DMA message."""
    twin_socket: bool = False
    """DMA_READ and DMA_WRITE have a socket of their own, whose client end is fd 0 of the reply."""
    write_multiple: bool = False


def negotiate(payload: Buffer, *, write_multiple: bool = False) -> tuple[Negotiated, bytes]:
    """Answer the payload of a client's VERSION request: what was agreed, and the payload of the reply.

    The reply names only what the client named (it "must be a subset of those proposed"), and is never longer than the
    request: QEMU receives it into the request's own buffer. What does not fit is left out, the least important first.
    ``write_multiple`` allows REGION_WRITE_MULTI to a client that offers it.

    Raises a fatal PeerError for another major version and for JSON that is none. Unknown keys are ignored.
    """
    if len(payload) < _FIXED_SIZE:
        raise PeerError(f"VERSION: payload of 0x{len(payload):x} bytes, 4 or more expected", fatal=True)
    version = VERSION.parse(bytes(payload))
    if version.major != MAJOR:
        raise PeerError(f"VERSION: major 0x{version.major:x} is not 0x{MAJOR:x}", fatal=True)
    minor = min(version.minor, MINOR)
    fixed: bytes = VERSION.build({"major": MAJOR, "minor": minor, "data": b""})
    offered = _capabilities(version.data)

    # Most important first.
    answers: list[tuple[str, object]] = []
    twin = offered.get("twin_socket")
    if isinstance(twin, dict) and twin.get("supported") is True:
        answers.append(("twin_socket", {"supported": True, "fd_index": 0}))
    answers.append(("max_msg_fds", MAX_MSG_FDS))
    answers.append(("max_data_xfer_size", MAX_DATA_XFER_SIZE))
    if write_multiple and offered.get("write_multiple") is True:
        answers.append(("write_multiple", True))
    answers.append(("pgsizes", 4096))
    answers.append(("max_dma_maps", MAX_DMA_MAPS))

    answered = {key: value for key, value in answers if key in offered}
    data = _encode(answered)
    while len(data) > len(version.data) and answered:
        answered.popitem()
        data = _encode(answered)
    if len(data) > len(version.data):
        data = b""  # no JSON in the request, or none that even `{}` fits into

    agreed = Negotiated(
        minor=minor,
        max_msg_fds=_number(offered, "max_msg_fds", 0),
        max_data_xfer_size=min(_number(offered, "max_data_xfer_size", 1), MAX_DATA_XFER_SIZE),
        twin_socket="twin_socket" in answered,
        write_multiple="write_multiple" in answered,
    )
    return agreed, fixed + data


def _capabilities(data: bytes) -> dict[str, Any]:
    """The ``capabilities`` object of VERSION's JSON; empty where there is none."""
    if data in (b"", b"\0"):
        return {}
    if data[-1] != 0:
        raise PeerError("VERSION: the JSON does not end with a NUL", fatal=True)
    try:
        document = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
        raise PeerError(f"VERSION: the data is not JSON ({error})", fatal=True) from None
    capabilities = document.get("capabilities", {}) if isinstance(document, dict) else None
    if not isinstance(capabilities, dict):
        raise PeerError("VERSION: the JSON is not an object with an object `capabilities`", fatal=True)
    return capabilities


def _number(offered: dict[str, Any], key: str, minimum: int) -> int:
    value = offered.get(key, VERSION_DATA_DEFAULTS[key])
    if type(value) is not int or value < minimum:  # a bool is an int, too
        raise PeerError(f"VERSION: {key} is {quoted(value)}, a number from {minimum} on expected", fatal=True)
    return value


def _encode(capabilities: dict[str, object]) -> bytes:
    document = {"capabilities": capabilities} if capabilities else {}
    return json.dumps(document, separators=(",", ":")).encode() + b"\0"
