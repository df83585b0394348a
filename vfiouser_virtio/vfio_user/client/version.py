"""Version negotiation, client side ("VFIO_USER_VERSION"): the proposal, and the server's answer, as pure functions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import VERSION_DATA_DEFAULTS
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.vfio_user.client.requests import protocol_error
from vfiouser_virtio.vfio_user.wire.version import build_payload, number, parse_capabilities, parse_payload, wrong

# Key for key and in the order of QEMU 11.1.3: with header, version and NUL it has 214 bytes, and so may the reply.
_QEMU_CAPABILITIES: dict[str, object] = {
    "pgsizes": 4096,
    "max_msg_fds": 16,
    "max_dma_maps": 65535,
    "max_data_xfer_size": 1 << 20,
    "migration": {"max_bitmap_size": 256 << 20, "pgsize": 4096},
    "write_multiple": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionProposal:
    """VERSION request of a client. The default is QEMU's, with the newest minor."""

    major: int = 0
    minor: int = 1
    capabilities: Mapping[str, object] | None = field(default_factory=lambda: MappingProxyType(_QEMU_CAPABILITIES))
    """The object `capabilities` of the JSON; None for a request that has no JSON."""
    data: bytes | None = None
    """What follows the two numbers, byte for byte, instead of JSON and NUL."""

    def with_capabilities(self, **changes: object) -> "VersionProposal":
        """The same with these capabilities added or changed; a value of None takes one away."""
        changed = {key: value for key, value in {**(self.capabilities or {}), **changes}.items() if value is not None}
        return replace(self, capabilities=changed)

    def payload(self) -> bytes:
        """The bytes behind the header."""
        data = self.data
        if data is None and self.capabilities is None:
            data = b""
        elif data is None:
            data = json.dumps({"capabilities": dict(self.capabilities or {})}).encode() + b"\0"
        return build_payload(self.major, self.minor, data)


QEMU_VERSION = VersionProposal(minor=0)
"""What QEMU 11.1 proposes, byte for byte: no twin socket."""

SPDK_VERSION = VersionProposal(minor=1, capabilities=None)
"""What SPDK's userspace driver proposes: two numbers, no JSON and no NUL."""

TWIN_VERSION = VersionProposal().with_capabilities(twin_socket={"supported": True})
"""The default, and DMA_READ and DMA_WRITE on a socket of their own, if the server can."""


@dataclass(frozen=True, slots=True)
class Version:
    """Negotiated version: what both sides may do from here on. An absent capability has its default."""

    major: int
    minor: int
    capabilities: dict[str, Any]
    """As they came, unknown ones too."""
    max_msg_fds: int
    """How many fds the server takes in one message."""
    max_data_xfer_size: int
    """How many bytes the server takes in one region access."""
    max_dma_maps: int
    pgsizes: int
    write_multiple: bool
    twin_fd_index: int | None
    """Which fd of the reply is the socket for DMA_READ and DMA_WRITE; None where they share the main one."""


def parse_version(proposal: VersionProposal, payload: Buffer) -> Version:
    """The payload of a VERSION reply.

    Raises a fatal PeerError for what "VFIO_USER_VERSION" does not allow: another major, a higher minor than proposed,
    JSON without a NUL or that is none, a capability of the wrong type, a twin socket that was not proposed.
    """
    version = parse_payload(payload, _blame)
    if version.major != proposal.major or version.minor > proposal.minor:
        raise _blame(
            f"{version.major:#x}.{version.minor:#x} is the answer to {proposal.major:#x}.{proposal.minor:#x}; "
            "the same major and no higher minor are allowed"
        )
    found = parse_capabilities(version.data, _blame)
    return Version(
        major=version.major,
        minor=version.minor,
        capabilities=found,
        max_msg_fds=number(found, "max_msg_fds", _blame),
        max_data_xfer_size=number(found, "max_data_xfer_size", _blame),
        max_dma_maps=number(found, "max_dma_maps", _blame),
        pgsizes=number(found, "pgsizes", _blame),
        write_multiple=_boolean(found, "write_multiple"),
        twin_fd_index=_twin_fd_index(found, proposal),
    )


def _blame(what: str) -> PeerError:
    return protocol_error(f"the reply to VERSION: {what}")


def _boolean(found: dict[str, Any], key: str) -> bool:
    value = found.get(key, VERSION_DATA_DEFAULTS[key])
    if not isinstance(value, bool):
        raise wrong(key, value, "a boolean", _blame)
    return value


def _twin_fd_index(found: dict[str, Any], proposal: VersionProposal) -> int | None:
    twin = found.get("twin_socket", VERSION_DATA_DEFAULTS["twin_socket"])
    if not isinstance(twin, dict) or not isinstance(twin.get("supported"), bool):
        raise wrong("twin_socket", twin, "an object with a boolean `supported`", _blame)
    if not twin["supported"]:
        return None
    asked = (proposal.capabilities or {}).get("twin_socket")
    if not isinstance(asked, Mapping) or asked.get("supported") is not True:
        raise _blame("a twin socket that was not proposed")
    index = twin.get("fd_index")
    if type(index) is not int or index < 0:
        raise wrong("twin_socket.fd_index", index, "the number of an fd", _blame)
    return index
