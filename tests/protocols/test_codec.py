"""The derived codecs read and write the same bytes as the construct schemas they come from."""

import gc

import construct as c
import pytest

from vfiouser_virtio.protocols.codec import Schema, codec, offsets, parse, plain

INNER = c.Struct("low" / c.Int32ul, "high" / c.Int32ul)
EVERYTHING = c.Struct(
    "byte" / c.Int8ul,
    "any_endian_byte" / c.Byte,
    "short" / c.Int16ul,
    "word" / c.Int32ul,
    "signed" / c.Int32sl,
    "long" / c.Default(c.Int64ul, 7),
    "name" / c.Bytes(5),
    c.Padding(3),
    "numbers" / c.Array(3, c.Int16ul),
    "inner" / INNER,
    "pairs" / c.Array(2, INNER),
)
RAW = bytes(range(1, 1 + EVERYTHING.sizeof()))


def flat(value: object) -> list[object]:
    """Every scalar of what construct parsed, in wire order."""
    if isinstance(value, dict):
        return [scalar for name, field in value.items() if not str(name).startswith("_") for scalar in flat(field)]
    if isinstance(value, list):
        return [scalar for item in value for scalar in flat(item)]
    return [value]


def test_codec_parses_what_construct_parses() -> None:
    derived = codec(EVERYTHING)
    assert derived.size == EVERYTHING.sizeof() == len(RAW)
    assert list(derived.unpack(RAW)) == flat(EVERYTHING.parse(RAW))


def test_codec_builds_what_construct_builds() -> None:
    values = EVERYTHING.parse(RAW)
    assert codec(EVERYTHING).pack(*flat(values)) == EVERYTHING.build(values)


def test_offsets_flatten_nested_names() -> None:
    assert offsets(EVERYTHING) == {
        "byte": (0, 1),
        "any_endian_byte": (1, 1),
        "short": (2, 2),
        "word": (4, 4),
        "signed": (8, 4),
        "long": (12, 8),
        "name": (20, 5),
        "numbers": (28, 6),
        "inner_low": (34, 4),
        "inner_high": (38, 4),
        "pairs": (42, 16),
    }


@pytest.mark.parametrize(
    "schema",
    [
        c.Struct("big" / c.Int16ub),
        c.Struct("odd" / c.Int24ul),
        c.Struct("rest" / c.GreedyBytes),
        c.Struct("count" / c.Int8ul, "items" / c.Array(c.this.count, c.Int8ul)),
        c.Struct("data" / c.Bytes(lambda _: 4)),
        c.Struct("choice" / c.Enum(c.Int8ul, one=1)),
        c.Struct(c.Int8ul),
    ],
    ids=["big endian", "24 bit", "greedy", "counted array", "counted bytes", "enum", "unnamed"],
)
def test_what_is_not_flat_is_refused(schema: c.Struct) -> None:
    with pytest.raises(TypeError, match=r"not flat|no name"):
        codec(schema)


def test_only_a_struct_has_offsets() -> None:
    with pytest.raises(TypeError, match="no fields"):
        offsets(c.Int32ul)


PLAIN = c.Struct("byte" / c.Int8ul, c.Padding(3), "signed" / c.Default(c.Int32sl, -1), "name" / c.Bytes(4))


@pytest.mark.parametrize("schema", [PLAIN, "header" / PLAIN])
def test_a_plain_structure_is_parsed_as_construct_does_and_leaves_no_garbage(schema: Schema) -> None:
    data = bytes(range(240, 252))
    parsed = parse(schema, data)
    assert parsed == schema.parse(data)
    assert (parsed.byte, parsed.name, list(parsed)) == (240, data[8:], ["byte", "signed", "name"])
    gc.collect()
    for _ in range(100):
        parse(schema, data)
    assert gc.collect() < 10


@pytest.mark.parametrize(
    "schema",
    [
        EVERYTHING,
        c.Struct("kind" / c.Enum(c.Byte, read=1)),
        c.Struct("magic" / c.Const(b"\x01")),
        c.Struct("big" / c.Int16ub),
        c.Struct("sum" / c.Byte * (lambda obj, context: None)),
        c.Int32ul,
    ],
)
def test_what_is_not_plain_is_for_construct(schema: Schema) -> None:
    assert plain(schema) is None
    data = RAW[: schema.sizeof()]
    assert parse(schema, data) == schema.parse(data)


def test_too_few_bytes_are_an_error_of_constructs() -> None:
    with pytest.raises(c.ConstructError):
        parse(PLAIN, bytes(3))
