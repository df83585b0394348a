"""Codec: a ``struct.Struct`` from a flat construct schema, so that a hot path and its documentation are one.

*Flat* means `FormatField`s of one byte order, `Bytes`, `Padding`, fixed `Array`s of those, and named nested `Struct`s.
Parsing with construct costs 8 to 30 µs per structure, with the derived codec 0.1 to 0.4 µs.
"""

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import construct as c

# Any: construct's own type parameters say nothing about the layout.
Schema: TypeAlias = "c.Construct[Any, Any]"


NUMBERS: Mapping[int, struct.Struct] = {struct.calcsize(each): struct.Struct(each) for each in ("<B", "<H", "<I", "<Q")}
"""Unsigned little-endian number of so many bytes. `int.from_bytes` of a memoryview takes three times as long: it makes
bytes of it first."""


def codec(schema: Schema) -> struct.Struct:
    """The ``struct.Struct`` that packs and unpacks exactly what ``schema`` does, one value per field in wire order.

    An array contributes one value per element, a nested struct one per field, padding none. A `Default` only matters
    to construct's ``build``: packing needs every value.

    Raises TypeError for a schema that is not flat and little-endian.
    """
    return struct.Struct("<" + _format(schema, "<"))


def network_codec(schema: Schema) -> struct.Struct:
    """As `codec`, for big-endian fields: network byte order."""
    return struct.Struct(">" + _format(schema, ">"))


@lru_cache(128)
def offsets(schema: Schema) -> Mapping[str, tuple[int, int]]:
    """Where each field lies: ``{name: (offset, size)}`` in bytes, a field of a nested struct as ``outer_inner``.

    An array is one entry. The answer is kept, as each device asks for that of its configuration.

    Raises TypeError for a schema that is not flat and little-endian.
    """
    found: dict[str, tuple[int, int]] = {}
    _locate(schema, "", 0, found)
    return found


def parse(schema: Schema, data: bytes) -> Any:
    """As ``schema.parse(data)``, of as many bytes as it has where that is a fixed number.

    A little-endian structure of nothing but numbers and bytes takes a ninth of the time, and leaves nothing behind:
    construct's contexts refer to themselves, two for each structure, and stay until Python looks for such garbage.
    Raises ConstructError.
    """
    found = plain(schema)
    if found is None or len(data) != found[1].size:
        return schema.parse(data)
    names, layout = found
    return c.Container(zip(names, layout.unpack(data), strict=True))


@lru_cache(128)
def plain(schema: Schema) -> tuple[Sequence[str], struct.Struct] | None:
    """Names and codec of the fields of a structure for which `parse` has no use for construct; None for another.

    The answer is kept, as it is wanted for each request.
    """
    if isinstance(schema, c.Renamed) and schema.parsed is None:
        schema = schema.subcon
    if type(schema) is not c.Struct or schema.parsed is not None:
        return None
    names = []
    for field in schema.subcons:
        inner = field
        while isinstance(inner, c.Renamed | c.Default) and inner.parsed is None:
            inner = inner.subcon
        if type(inner) not in {c.FormatField, c.Bytes, c.Padded} or inner.parsed is not None:
            return None
        if field.name is not None:
            names.append(field.name)
    try:
        layout = codec(schema)
    except TypeError:
        return None
    return names, layout


def _format(schema: Schema, order: str) -> str:
    match schema:
        case c.Struct():
            return "".join(_format(_named(field), order) for field in schema.subcons)
        case c.Renamed() | c.Default():
            return _format(schema.subcon, order)
        case c.FormatField() if schema.fmtstr[0] == order or schema.length == 1:
            # "L" and "l" have 4 bytes in "<" and ">" mode, like in construct.
            return str(schema.fmtstr[1:])
        case c.Bytes() if isinstance(schema.length, int):
            return f"{schema.length}s"
        case c.Padded() if schema.subcon is c.Pass and isinstance(schema.length, int):
            return f"{schema.length}x"
        case c.Array() if isinstance(schema.count, int):
            return _format(schema.subcon, order) * schema.count
    wanted = "little" if order == "<" else "big"
    raise TypeError(f"{schema!r} is not flat: its layout is not fixed, or not {wanted}-endian")


def _named(field: Schema) -> Schema:
    """Refuse what construct parses but does not return: the derived codec would have a value more."""
    if field.name is None and not isinstance(field, c.Padded):
        raise TypeError(f"{field!r} has no name")
    return field


def _locate(schema: Schema, prefix: str, start: int, found: dict[str, tuple[int, int]]) -> None:
    if not isinstance(schema, c.Struct):
        raise TypeError(f"{schema!r} has no fields")
    offset = start
    for field in schema.subcons:
        size = struct.calcsize("<" + _format(_named(field), "<"))
        inner = field
        while isinstance(inner, c.Renamed | c.Default):
            inner = inner.subcon
        if isinstance(inner, c.Struct):
            _locate(inner, f"{prefix}{field.name}_", offset, found)
        elif field.name is not None:
            found[prefix + field.name] = (offset, size)
        offset += size
