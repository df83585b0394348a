"""Version negotiation, server side ("VFIO_USER_VERSION"): a pure function from the client's payload to the reply."""

from typing import NamedTuple

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.vfio_device import MAX_DMA_MAPS, Buffer
from vfiouser_virtio.vfio_user.wire.connection import MAX_DATA_XFER_SIZE, MAX_MSG_FDS
from vfiouser_virtio.vfio_user.wire.version import (
    build_capabilities,
    build_payload,
    number,
    parse_capabilities,
    parse_payload,
)

MAJOR = 0
MINOR = 1
"""The newest minor we speak. Nothing but the number differs from 0.0, and QEMU, which sends 0, refuses a 1."""


MOST_FDS = 253
"""What Linux takes in one message (SCM_MAX_FD); one with more could not be sent, and would end the connection."""


class Negotiated(NamedTuple):
    """Negotiated version: what both sides may do from here on."""

    minor: int = 0
    max_msg_fds: int = 1
    """How many fds the client takes in one message."""
    max_data_xfer_size: int = MAX_DATA_XFER_SIZE
    """How many bytes the client takes in one DMA message."""
    twin_socket: bool = False
    """DMA_READ and DMA_WRITE have a socket of their own, whose client end is fd 0 of the reply."""
    write_multiple: bool = False


def negotiate(payload: Buffer, *, write_multiple: bool = False, twin_socket: bool = True) -> tuple[Negotiated, bytes]:
    """Answer the payload of a client's VERSION request: what was agreed, and the payload of the reply.

    The reply names only what the client named (it "must be a subset of those proposed"), and is never longer than the
    request: QEMU receives it into the request's own buffer. What does not fit is left out, the least important first.
    ``write_multiple`` allows REGION_WRITE_MULTI to a client that offers it, ``twin_socket`` a socket for DMA messages.

    Raises a fatal PeerError for another major version and for JSON that is none. Unknown keys are ignored.
    """
    version = parse_payload(payload, _blame)
    if version.major != MAJOR:
        raise _blame(f"major {version.major:#x} is not {MAJOR:#x}")
    offered = {} if version.data == b"\0" else parse_capabilities(version.data, _blame)

    # Most important first.
    answers: list[tuple[str, object]] = []
    twin = offered.get("twin_socket")
    if twin_socket and isinstance(twin, dict) and twin.get("supported") is True:
        answers.append(("twin_socket", {"supported": True, "fd_index": 0}))
    answers.append(("max_msg_fds", MAX_MSG_FDS))
    answers.append(("max_data_xfer_size", MAX_DATA_XFER_SIZE))
    if write_multiple and offered.get("write_multiple") is True:
        answers.append(("write_multiple", True))
    answers.append(("pgsizes", 4096))
    answers.append(("max_dma_maps", MAX_DMA_MAPS))

    answered = {key: value for key, value in answers if key in offered}
    data = build_capabilities(answered)
    while len(data) > len(version.data) and answered:
        answered.popitem()
        data = build_capabilities(answered)
    if len(data) > len(version.data):
        data = b""  # no JSON in the request, or none that even `{}` fits into

    agreed = Negotiated(
        minor=min(version.minor, MINOR),
        max_msg_fds=min(number(offered, "max_msg_fds", _blame), MOST_FDS),
        max_data_xfer_size=min(number(offered, "max_data_xfer_size", _blame, minimum=1), MAX_DATA_XFER_SIZE),
        twin_socket="twin_socket" in answered,
        write_multiple="write_multiple" in answered,
    )
    return agreed, build_payload(MAJOR, agreed.minor, data)


def _blame(what: str) -> PeerError:
    return PeerError(f"VERSION: {what}", fatal=True)
