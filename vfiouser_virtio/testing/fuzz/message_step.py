"""Messages of fuzz cases: from names and fields, as people read them in a corpus file, to bytes.

A step names its command by name or number. Its payload is ``body`` (hex); or ``fields`` of the structure with which the
payload of that command begins (what is not named is 0), then ``text``, then ``data`` (hex)::

    {"do": "message", "command": "DMA_MAP", "fields": {"argsz": 32, "flags": 3, "size": 4096}, "fds": ["ram"]}
"""

from collections.abc import Mapping
from typing import Any

import construct as c

from vfiouser_virtio.protocols.codec import Schema, offsets
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_FEATURE_HEADER,
    DEVICE_INFO,
    DIRTY_PAGES_HEADER,
    DMA_ACCESS,
    DMA_MAP,
    DMA_UNMAP,
    IRQ_INFO,
    IRQ_SET,
    MIG_DATA,
    REGION_ACCESS,
    REGION_INFO,
    REGION_IO_FDS,
    Command,
)

_HEADS: dict[Command, Schema] = {
    Command.VERSION: c.Struct("major" / c.Int16ul, "minor" / c.Int16ul),
    Command.DMA_MAP: DMA_MAP,
    Command.DMA_UNMAP: DMA_UNMAP,
    Command.DEVICE_GET_INFO: DEVICE_INFO,
    Command.DEVICE_GET_REGION_INFO: REGION_INFO,
    Command.DEVICE_GET_REGION_IO_FDS: REGION_IO_FDS,
    Command.DEVICE_GET_IRQ_INFO: IRQ_INFO,
    Command.DEVICE_SET_IRQS: IRQ_SET,
    Command.REGION_READ: REGION_ACCESS,
    Command.REGION_WRITE: REGION_ACCESS,
    Command.DMA_READ: DMA_ACCESS,
    Command.DMA_WRITE: DMA_ACCESS,
    Command.DIRTY_PAGES: DIRTY_PAGES_HEADER,
    Command.REGION_WRITE_MULTI: c.Struct("wr_cnt" / c.Int64ul),
    Command.DEVICE_FEATURE: DEVICE_FEATURE_HEADER,
    Command.MIG_DATA_READ: MIG_DATA,
    Command.MIG_DATA_WRITE: MIG_DATA,
}

HEADS: Mapping[int, Mapping[str, tuple[int, int]]] = {int(each): offsets(head) for each, head in _HEADS.items()}
"""The fields with which a command's payload begins: name to (offset, size) in bytes."""


def command_number(command: int | str) -> int:
    """The number of a command by name or number. Raises ValueError for a name that no command has."""
    if isinstance(command, int):
        return command
    if command not in Command.__members__:
        raise ValueError(f"there is no command {command!r}")
    return int(Command[command])


def command_name(command: int | str) -> str:
    """What a command is called; ``command 0x63`` where there is none."""
    number = command_number(command)
    return Command(number).name if number in set(Command) else f"command {number:#x}"


def payload(
    command: int | str, body: str = "", fields: Mapping[str, int] | None = None, text: str = "", data: str = ""
) -> bytes:
    """What follows the header. Raises ValueError for a field that the command does not have, or hex that is none."""
    command = command_number(command)
    if fields is None:
        return bytes.fromhex(body) + text.encode(errors="surrogatepass") + bytes.fromhex(data)
    known = HEADS.get(command, {})
    head = bytearray(max((at + size for at, size in known.values()), default=0))
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{command_name(command)} has no field {name!r}")
        at, size = known[name]
        head[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    return bytes(head) + text.encode(errors="surrogatepass") + bytes.fromhex(data)


def payload_of(step: Mapping[str, Any]) -> bytes:
    """The same of a whole step."""
    keys = ("command", "body", "fields", "text", "data")
    return payload(**{key: step[key] for key in keys if key in step})
