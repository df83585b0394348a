"""Payload of VERSION ("VFIO_USER_VERSION"), in a request and in its reply: two numbers, capabilities in JSON."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vfiouser_virtio.device_log import quoted
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import VERSION_DATA_DEFAULTS, VERSION_NUMBERS_CODEC
from vfiouser_virtio.vfio_device import Buffer

_FIXED_SIZE = VERSION_NUMBERS_CODEC.size
MAX_PAYLOAD = 16 << 10
"""Bytes that are taken; QEMU sends 200. JSON of 1 MiB is 350,000 lists, which took 0.1 s, for each connection."""

Blame = Callable[[str], PeerError]
"""The fatal error for what the other end has got wrong, from the words behind "VERSION"."""


class VersionPayload(NamedTuple):
    """Received payload."""

    major: int
    minor: int
    data: bytes
    """What follows the numbers: JSON and a NUL, or nothing."""


def parse_payload(payload: Buffer, blame: Blame) -> VersionPayload:
    """The two numbers, and what follows. Raises what ``blame`` makes."""
    if len(payload) < _FIXED_SIZE:
        raise blame(f"payload of {len(payload):#x} bytes, 4 or more expected")
    if len(payload) > MAX_PAYLOAD:
        raise blame(f"payload of {len(payload):#x} bytes, up to {MAX_PAYLOAD:#x} are taken")
    major, minor = VERSION_NUMBERS_CODEC.unpack_from(payload)
    return VersionPayload(major, minor, bytes(payload[_FIXED_SIZE:]))


def build_payload(major: int, minor: int, data: bytes) -> bytes:
    """The bytes behind the header."""
    return VERSION_NUMBERS_CODEC.pack(major, minor) + data


def parse_capabilities(data: bytes, blame: Blame) -> dict[str, Any]:
    """The ``capabilities`` object of the JSON; empty where there is no JSON. Raises what ``blame`` makes."""
    if not data:
        return {}
    if data[-1] != 0:
        raise blame("the JSON does not end with a NUL")
    try:
        document = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of 5000 digits
        raise blame(f"the data is not JSON ({error})") from None
    capabilities = document.get("capabilities", {}) if isinstance(document, dict) else None
    if not isinstance(capabilities, dict):
        raise blame("the JSON is not an object with an object `capabilities`")
    return capabilities


def build_capabilities(capabilities: Mapping[str, object]) -> bytes:
    """JSON without spaces, and its NUL."""
    document = {"capabilities": dict(capabilities)} if capabilities else {}
    return json.dumps(document, separators=(",", ":")).encode() + b"\0"


def number(capabilities: Mapping[str, Any], key: str, blame: Blame, *, minimum: int = 0) -> int:
    """A capability that is a number, or its default. Raises what ``blame`` makes for a value that is none."""
    value = capabilities.get(key, VERSION_DATA_DEFAULTS[key])
    if type(value) is not int or value < minimum:  # a bool is an int, too
        raise wrong(key, value, f"a number from {minimum} on", blame)
    return value


def wrong(key: str, value: object, expected: str, blame: Blame) -> PeerError:
    """The error for a capability whose value is not what is ``expected``."""
    return blame(f"{key} is {quoted(value)}, {expected} expected")
