"""Accesses of registers in a message: where, and what was written or read."""

from typing import NamedTuple

import construct

from vfiouser_virtio.protocols.vfio_user import COMMANDS, Command, MessageFlags
from vfiouser_virtio.vfio_user import Message

_ACCESSES = (Command.REGION_READ, Command.REGION_WRITE, Command.REGION_WRITE_MULTI)


class RegionAccess(NamedTuple):
    """Bytes at an offset of a region that the driver has written, or read."""

    region: int
    offset: int
    data: bytes


def region_accesses(message: Message) -> list[RegionAccess]:
    """Those whose bytes are in ``message``: requests to write, and replies to reads."""
    if message.command not in _ACCESSES or message.flags & MessageFlags.ERROR:
        return []
    if message.is_reply == (message.command != Command.REGION_READ):
        return []  # it has no data
    formats = COMMANDS[Command(message.command)]
    try:
        parsed = (formats.reply if message.is_reply else formats.request).parse(bytes(message.body))
    except construct.ConstructError:
        return []
    found = []
    for each in parsed.get("wrs", [parsed]):
        access = each.get("access", each)
        found.append(RegionAccess(access.region, access.offset, bytes(each["data"][: access.count])))
    return found
