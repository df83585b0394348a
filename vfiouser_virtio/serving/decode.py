"""Decoder of vfio-user messages into lines of text: commands, fields and registers by their specifications' names."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from enum import IntEnum, IntFlag
from typing import Any

import construct

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import STD_HEADER_SIZEOF, TYPE0_HEADER
from vfiouser_virtio.protocols.vfio_user import (
    COMMANDS,
    Command,
    DeviceFlags,
    DmaMapFlags,
    DmaUnmapFlags,
    IrqInfoFlags,
    IrqSetFlags,
    MessageFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports.pci import COMMON, DEVICE, ISR, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR
from vfiouser_virtio.vfio_user import Message

_SHOWN_BYTES = 32
# Fields that are not plain numbers.
_MEANINGS: dict[tuple[Command, str], type[IntEnum] | type[IntFlag]] = {
    (Command.DMA_MAP, "flags"): DmaMapFlags,
    (Command.DMA_UNMAP, "flags"): DmaUnmapFlags,
    (Command.DEVICE_GET_INFO, "flags"): DeviceFlags,
    (Command.DEVICE_GET_REGION_INFO, "flags"): RegionFlags,
    (Command.DEVICE_GET_REGION_INFO, "index"): PciRegion,
    (Command.DEVICE_GET_REGION_IO_FDS, "index"): PciRegion,
    (Command.DEVICE_GET_IRQ_INFO, "flags"): IrqInfoFlags,
    (Command.DEVICE_GET_IRQ_INFO, "index"): PciIrq,
    (Command.DEVICE_SET_IRQS, "flags"): IrqSetFlags,
    (Command.DEVICE_SET_IRQS, "index"): PciIrq,
}
# It says how long the structure is, as every reader of it knows.
_DULL = frozenset({"argsz", "_io"})
_HEADER_OFFSETS = offsets(TYPE0_HEADER)


def virtio_register(region: int, offset: int) -> str:
    """The name of what is at an offset of a region of a `VirtioPci`: ``device_status``; empty where it has none."""
    if region == PciRegion.CONFIG and offset < STD_HEADER_SIZEOF:
        return _at(_HEADER_OFFSETS, offset)
    if region != VIRTIO_BAR:
        return ""
    if offset >= NOTIFY:
        return f"notify queue {(offset - NOTIFY) // NOTIFY_MULTIPLIER}"
    if offset >= DEVICE:
        return f"device configuration+{offset - DEVICE:#x}"
    return "isr_status" if offset >= ISR else _at(COMMON_CFG_OFFSETS, offset - COMMON)


NameOf = Callable[[int, int], str]
"""What is at an offset of a region."""


def decode(message: Message, name_of: NameOf = virtio_register) -> str:
    """One line that says what ``message`` says; bytes in hex where it is not what its command has.

    ``name_of`` names registers: by default those of virtio devices on PCI.
    """
    try:
        command = Command(message.command)
    except ValueError:
        return f"command {message.command}: {_hex(bytes(message.body))}"
    words = [command.name]
    if message.flags & MessageFlags.NO_REPLY:
        words.append("(no reply)")
    if message.flags & MessageFlags.ERROR:
        words.append(f"refused: {errno.errorcode.get(message.error, message.error)}")
    else:
        words += _body(command, message, name_of)
    if message.fds:
        words.append(f"with {len(message.fds)} fd{'s' if len(message.fds) > 1 else ''}")
    return " ".join(words)


def decode_fields(message: Message, name_of: NameOf = virtio_register) -> dict[str, object]:
    """The same as names and values that JSON has; bytes in hex, the first 32 of them, and their ``count``."""
    try:
        command: Command | None = Command(message.command)
    except ValueError:
        command = None
    said: dict[str, object] = {"id": message.id, "command": command.name if command else message.command}
    said["type"] = "reply" if message.is_reply else "request"
    if message.flags & MessageFlags.NO_REPLY:
        said["no_reply"] = True
    if message.fds:
        said["fds"] = len(message.fds)
    if message.flags & MessageFlags.ERROR:
        said["error"] = errno.errorcode.get(message.error, message.error)
        return said
    body = bytes(message.body)
    if command is None or (message.is_reply and not body):
        return said | _data(body)
    formats = COMMANDS[command]
    try:
        parsed = (formats.reply if message.is_reply else formats.request).parse(body)
    except construct.ConstructError:
        return said | _data(body)
    match command:
        case Command.REGION_READ | Command.REGION_WRITE:
            access = parsed.get("access", parsed)
            said |= _place(access.region, access.offset, name_of)
            said |= {"count": access.count} | (_data(parsed["data"]) if "data" in parsed else {})
        case Command.DMA_READ | Command.DMA_WRITE:
            access = parsed.get("access", parsed)
            said |= {"address": access.address, "count": access.count}
            said |= _data(parsed["data"]) if "data" in parsed else {}
        case Command.REGION_WRITE_MULTI if not message.is_reply:
            said["writes"] = [
                _place(write.region, write.offset, name_of) | {"count": write.count} | _data(write.data[: write.count])
                for write in parsed.wrs
            ]
        case Command.VERSION:
            said |= {"major": parsed.major, "minor": parsed.minor, "json": _json(parsed.data)}
        case _:
            said |= _values(command, parsed)
    return said


def _place(region: int, offset: int, name_of: NameOf) -> dict[str, object]:
    where: dict[str, object] = {"region": _region(region), "offset": offset}
    if field := name_of(region, offset):
        where["register"] = field
    return where


def _data(data: bytes) -> dict[str, object]:
    said: dict[str, object] = {"data": data[:_SHOWN_BYTES].hex()} if data else {}
    if len(data) in (1, 2, 4, 8):
        said["value"] = int.from_bytes(data, "little")
    elif data:
        said["count"] = len(data)
    return said


def _values(command: Command, parsed: Mapping[str, object]) -> dict[str, object]:
    said: dict[str, object] = {}
    for name, value in parsed.items():
        match value:
            case _ if name in _DULL:
                pass
            case Mapping():
                said |= _values(command, value)
            case bytes():
                said |= {name: value[:_SHOWN_BYTES].hex()} if value else {}
            case int():
                meaning = _MEANINGS.get((command, name))
                said[name] = _named(meaning, value) if meaning else int(value)
    return said


def register(region: int, offset: int, name_of: NameOf = virtio_register) -> str:
    """What is at an offset of a region: ``BAR4+0x14 device_status``."""
    return f"{_region(region)}+{offset:#x} {name_of(region, offset)}".rstrip()


def _region(region: int) -> str:
    try:
        return PciRegion(region).name.lower() if region >= PciRegion.ROM else f"BAR{region}"
    except ValueError:
        return f"region {region}"


def _at(fields: Mapping[str, tuple[int, int]], offset: int) -> str:
    """The field that ``offset`` is in."""
    for name, (start, size) in fields.items():
        if start <= offset < start + size:
            return name if offset == start else f"{name}+{offset - start}"
    return ""


def _body(command: Command, message: Message, name_of: NameOf) -> Iterator[str]:
    formats = COMMANDS[command]
    body = bytes(message.body)
    if message.is_reply and not body:
        yield "done"
        return
    try:
        parsed = (formats.reply if message.is_reply else formats.request).parse(body)
    except construct.ConstructError:
        yield _hex(body)
        return
    match command:
        case Command.REGION_READ | Command.REGION_WRITE:
            access = parsed.get("access", parsed)
            yield register(access.region, access.offset, name_of)
            yield _outcome(message, parsed, access.count)
        case Command.DMA_READ | Command.DMA_WRITE:
            access = parsed.get("access", parsed)
            yield f"{access.address:#x}"
            yield _outcome(message, parsed, access.count)
        case Command.REGION_WRITE_MULTI if not message.is_reply:
            for write in parsed.wrs:
                yield f"{register(write.region, write.offset, name_of)} {_value(write.data[: write.count])};"
        case Command.VERSION:
            yield f"{parsed.major}.{parsed.minor} {_json(parsed.data)}"
        case _:
            yield from _fields(command, parsed)


def _outcome(message: Message, parsed: Mapping[str, Any], count: int) -> str:
    """What an access brings, asks for, or has done."""
    if "data" in parsed:
        return _value(parsed["data"])
    return "done" if message.is_reply else f"{count} bytes"


def _fields(command: Command, parsed: Mapping[str, object]) -> Iterator[str]:
    for name, value in parsed.items():
        match value:
            case _ if name in _DULL:
                pass
            case Mapping():
                yield from _fields(command, value)
            case bytes() if value:
                yield f"{name}={_hex(value)}"
            case int() if meaning := _MEANINGS.get((command, name)):
                yield f"{name}={_named(meaning, value)}"
            case int():
                yield f"{name}={value:#x}" if value > 9 else f"{name}={value}"


def _named(meaning: type[IntEnum] | type[IntFlag], value: int) -> str:
    try:
        return meaning(value).name or f"{value:#x}"
    except ValueError:
        return f"{value:#x}"


def _value(data: bytes) -> str:
    """Registers are numbers, whatever is longer is bytes."""
    if len(data) in (1, 2, 4, 8):
        return f"= {int.from_bytes(data, 'little'):#0{2 + 2 * len(data)}x}"
    return f"= {_hex(data)}"


def _hex(data: bytes) -> str:
    return data.hex(" ") if len(data) <= _SHOWN_BYTES else f"{data[:_SHOWN_BYTES].hex(' ')} … ({len(data)} bytes)"


def _json(data: bytes) -> str:
    try:
        return json.dumps(json.loads(data.rstrip(b"\0"))) if data else "without JSON"
    except ValueError:
        return _hex(data)
