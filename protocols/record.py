"""Record: a flat structure as named, changeable fields over its bytes, as both sides have configuration space."""

from collections.abc import Callable

from vfiouser_virtio.protocols.codec import Schema, offsets


class Record:
    """Bytes of one flat schema, with its fields by name: integers of 1, 2, 4 and 8 bytes, bytes for the rest."""

    __slots__ = ("data", "offsets")

    def __init__(self, schema: Schema, **fields: int | bytes) -> None:
        self.offsets = offsets(schema)
        """Name to (offset, size), in bytes."""
        self.data = bytearray(schema.sizeof())
        for name, value in fields.items():
            self[name] = value

    def __getitem__(self, name: str) -> int | bytes:
        offset, size = self.offsets[name]
        raw = bytes(self.data[offset : offset + size])
        return int.from_bytes(raw, "little") if size in (1, 2, 4, 8) else raw

    def __setitem__(self, name: str, value: int | bytes) -> None:
        """Raises KeyError for an unknown field, ValueError for a value that does not fit."""
        if name not in self.offsets:
            raise KeyError(f"no field {name!r} among {', '.join(self.offsets)}")
        offset, size = self.offsets[name]
        try:
            raw = value.to_bytes(size, "little") if isinstance(value, int) else bytes(value)
        except OverflowError as error:
            raise ValueError(f"{name} = {value!r} does not fit into {size} bytes") from error
        if len(raw) != size:
            raise ValueError(f"{name} has {size} bytes, not {len(raw)}")
        self.data[offset : offset + size] = raw

    def fields_in(self, offset: int, count: int) -> list[str]:
        """The fields that lie wholly inside a range of bytes."""
        return [name for name, (at, size) in self.offsets.items() if offset <= at and at + size <= offset + count]


def record(schema: Schema) -> Callable[..., Record]:
    """A constructor for records of one schema: fields by keyword, zero where nothing is said."""

    def make(**fields: int | bytes) -> Record:
        return Record(schema, **fields)

    return make
