"""Device configuration space, driver side (virtio 1.4, 2.5): fields by name over operations, never raw offsets.

After Dor Laor's wish of 2007: what backs the fields may be a transport (PCI, loopback) or a plain string of bytes.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.ports import Transport
from vfiouser_virtio.protocols.codec import Schema, offsets

# Tries of reading several fields of one generation. A device that changes faster than this breaks every driver.
MAX_TRIES = 64


class ConfigOps(Protocol):
    """Operations that `DriverConfig` needs."""

    async def read(self, offset: int, size: int) -> bytes:
        """Bytes of the structure; one access where ``size`` is 1, 2 or 4."""
        ...

    async def write(self, offset: int, data: bytes) -> None: ...

    async def generation(self) -> int:
        """Another number than before whenever bytes may have changed that were read in between (2.5.3)."""
        ...


class ByteConfig:
    """Configuration that is just bytes; call `changed` after each change of them."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        self._generation = 0

    def changed(self) -> None:
        """The bytes are others now."""
        self._generation += 1

    async def read(self, offset: int, size: int) -> bytes:
        return bytes(self.data[offset : offset + size]).ljust(size, b"\0")

    async def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    async def generation(self) -> int:
        return self._generation


class TransportConfig:
    """Configuration of a device behind a transport; writes wait for ``writable``."""

    def __init__(self, transport: Transport, writable: Callable[[], Awaitable[None]]) -> None:
        self._transport = transport
        self._writable = writable

    async def read(self, offset: int, size: int) -> bytes:
        return await self._transport.read_config(offset, size)

    async def write(self, offset: int, data: bytes) -> None:
        await self._writable()
        await self._transport.write_config(offset, data)

    async def generation(self) -> int:
        return await self._transport.read_generation()


class DriverConfig:
    """Fields of one schema: integers of 1, 2, 4 and 8 bytes, bytes for the rest; nested ones as ``outer_inner``."""

    def __init__(self, ops: ConfigOps, schema: "Schema | None") -> None:
        self._ops = ops
        self._offsets = {} if schema is None else offsets(schema)

    @property
    def fields(self) -> tuple[str, ...]:
        """Their names, in the order of the structure."""
        return tuple(self._offsets)

    async def get(self, field: str) -> int | bytes:
        """One field's value, whole even where it takes several accesses. Raises KeyError for an unknown field."""
        return (await self.get_all(field))[field]

    async def get_int(self, field: str) -> int:
        """One field that is an integer. Raises TypeError for one that is not."""
        value = await self.get(field)
        if not isinstance(value, int):
            raise TypeError(f"configuration field {field} is {len(value)} bytes, no integer")
        return value

    async def get_all(self, *fields: str) -> dict[str, int | bytes]:
        """Several fields (none named: all) of one generation, so that they fit together (2.5.4).

        Raises KeyError for an unknown field, DeviceBroken (CC4) when the generation never stays the same.
        """
        places = [(name, *self._locate(name)) for name in fields or self._offsets]
        if len(places) == 1 and places[0][2] in (1, 2, 4):
            name, offset, size = places[0]
            return {name: _value(await self._ops.read(offset, size))}  # one access: it cannot be torn
        before = await self._ops.generation()
        for _ in range(MAX_TRIES):
            values = {name: _value(await self._ops.read(offset, size)) for name, offset, size in places}
            after = await self._ops.generation()
            if after == before:
                return values
            before = after
        raise DeviceBroken(f"config_generation changed during each of {MAX_TRIES} readings", "CC4")

    async def set(self, field: str, value: int | bytes) -> None:
        """Write one field. Raises KeyError for an unknown one, ValueError for a value that does not fit into it."""
        offset, size = self._locate(field)
        try:
            data = value.to_bytes(size, "little") if isinstance(value, int) else bytes(value)
        except OverflowError as error:
            raise ValueError(f"{field} = {value!r} does not fit into {size} bytes") from error
        if len(data) != size:
            raise ValueError(f"{field} has {size} bytes, not {len(data)}")
        await self._ops.write(offset, data)

    def _locate(self, field: str) -> tuple[int, int]:
        if field not in self._offsets:
            raise KeyError(f"no configuration field {field!r} among {', '.join(self._offsets) or 'none'}")
        return self._offsets[field]


def _value(data: bytes) -> int | bytes:
    return int.from_bytes(data, "little") if len(data) in (1, 2, 4, 8) else data
