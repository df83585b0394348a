"""Checks of the replies of a vfio-user server ("Message Protocol", "Commands").

Only what the specification says, or what cannot be read at all: a server may answer with an error to anything.
"""

from vfiouser_virtio.protocols.vfio_user import (
    MESSAGE_TYPE_MASK,
    Command,
    DeviceFeatureFlags,
    MessageFlags,
)
from vfiouser_virtio.testing.fuzz.message_step import HEADS, command_name
from vfiouser_virtio.testing.raw.client import RawMessage

_FDS_ALLOWED = (
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_REGION_IO_FDS,
    Command.DEVICE_FEATURE,
)
MAX_MSG_FDS = 16
"""What our VERSION says, as QEMU's does."""
_ARGSZ_LIMITS = (
    Command.DEVICE_GET_INFO,
    Command.DEVICE_GET_REGION_INFO,
    Command.DEVICE_GET_REGION_IO_FDS,
    Command.DEVICE_GET_IRQ_INFO,
)
_DATA_AT = 16  # of REGION_READ: behind the access that it answers


def header_complaint(reply: RawMessage, command: int) -> tuple[str, str]:
    """What is wrong with the header of a reply to ``command``, in words and in one; empty if nothing."""
    what = f"reply to {command_name(command)}, id {reply.id:#x}, flags {reply.flags:#x}, error {reply.error}"
    if reply.command != command:
        return f"{what}: its command is {reply.command:#x}", "command"
    if reply.flags & MESSAGE_TYPE_MASK != MessageFlags.REPLY or reply.flags & MessageFlags.NO_REPLY:
        return f"{what}: no such flags in a reply", "flags"
    if reply.error and not reply.flags & MessageFlags.ERROR:
        return f"{what}: an error without the Error flag", "error"
    return "", ""


def fds_complaint(reply: RawMessage, command: int, request: bytes) -> str:
    """What is wrong with the file descriptors that came with a reply; ``request`` is the body of what was asked."""
    if not reply.fds:
        return ""
    # The socket for DMA requests, where the client has said that it can have one.
    twin = command == Command.VERSION and b'"twin_socket"' in request
    if reply.flags & MessageFlags.ERROR or not (twin or command in _FDS_ALLOWED):
        return f"{len(reply.fds)} file descriptors come with a reply to {command_name(command)}, where none belong"
    if len(reply.fds) > MAX_MSG_FDS:
        return f"{len(reply.fds)} file descriptors come with one message; max_msg_fds is {MAX_MSG_FDS}"
    return ""


def body_complaint(reply: RawMessage, command: int, request: bytes) -> str:
    """What is wrong with the body of a reply; ``request`` is the body of what was asked."""
    if reply.flags & MessageFlags.ERROR:
        return ""
    body, size = reply.body, len(reply.body)
    said = f"{size:#x} bytes in reply to {command_name(command)}"
    head = max((at + length for at, length in HEADS.get(command, {}).values()), default=0)
    if command == Command.REGION_READ:
        count = int.from_bytes(body[12:16], "little")
        asked = int.from_bytes(request[12:16], "little")
        if size < _DATA_AT or size - _DATA_AT != count:
            return f"{said}, whose count is {count:#x}"
        if count > asked:
            return f"{said}, of {asked:#x} that were asked for"
        if body[:12] != request[:12]:
            return f"{said}: of another region or offset"
    elif command == Command.REGION_WRITE:
        if size != head:
            return f"{said}, {head:#x} expected"
    elif command in _ARGSZ_LIMITS:
        argsz = int.from_bytes(request[:4], "little")
        if size < head:
            return f"{said}: the structure has {head:#x}"
        if size > max(argsz, head):
            return f"{said}, more than argsz {argsz:#x}"
    elif command == Command.VERSION and size < head:
        return f"{said}: no version in it"
    elif command == Command.DEVICE_FEATURE:
        flags = int.from_bytes(request[4:8], "little")
        if flags & DeviceFeatureFlags.GET and size < head:
            return f"{said}: the structure has {head:#x}"
    return ""
