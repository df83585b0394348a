"""Values as users write them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from vfiouser_virtio.serving.options import kind_of
from vfiouser_virtio.virtio.options import Duration, Size


@pytest.mark.parametrize(
    ("annotation", "written", "value"),
    [
        (str, "x=y", "x=y"),
        (bytes, "abc", b"abc"),
        (Path, "/a", Path("/a")),
        (str | os.PathLike[str], "/a", "/a"),
        (bool, "on", True),
        (bool, "OFF", False),
        (bool, False, False),
        (int, "0x1af4", 0x1AF4),
        (int, 7, 7),
        (float, "0.5", 0.5),
        (Size, "512", 512),
        (Size, "0x1000", 4096),
        (Size, "64M", 64 << 20),
        (Size, "1.5G", 3 << 29),
        (Size, "9007199254740993", 2**53 + 1),
        (Size, 4096, 4096),
        (Duration, "50ms", 0.05),
        (Duration, "2s", 2.0),
        (Duration, "2", 2.0),
        (Duration, 0.25, 0.25),
        (Literal["a", "b"], "b", "b"),
        (Literal[1, 2], "2", 2),
        (Annotated[Size | None, "help"], "1k", 1024),
        (list[str], "a", ["a"]),
        (Annotated[list[int] | None, "help"], ["1", 2], [1, 2]),
        (Sequence[str], ["a", "b"], ["a", "b"]),
        (int | str, "seven", "seven"),
    ],
)
def test_converts(annotation: Any, written: object, value: object) -> None:
    kind = kind_of(annotation)
    assert kind is not None
    assert kind.convert(written) == value


@pytest.mark.parametrize(
    ("annotation", "written"),
    [
        (str, 7),
        (Path, ""),
        (Path, "a\0b"),
        (bool, "maybe"),
        (bool, 1),
        (int, "12x"),
        (int, True),
        (int, "1.5"),
        (float, "much"),
        (Size, "64Q"),
        (Size, "-1"),
        (Size, -1),
        (Size, "0.3"),
        (Size, True),
        (Duration, "-1"),
        (Duration, "nan"),
        (Duration, "inf"),
        (Duration, "2h"),
        (Literal["a", "b"], "c"),
        (list[int], ["1", "x"]),
    ],
)
def test_refuses(annotation: Any, written: object) -> None:
    kind = kind_of(annotation)
    assert kind is not None
    with pytest.raises((ValueError, TypeError)):
        kind.convert(written)


@pytest.mark.parametrize("annotation", [object, dict[str, str], tuple[int, str], type(None), list[object], None])
def test_what_users_cannot_write(annotation: Any) -> None:
    assert kind_of(annotation) is None


def test_a_union_is_as_its_members() -> None:
    both = kind_of(list[int] | bool | None)
    assert both is not None
    assert (both.repeats, both.switch, both.shown) == (True, True, "N|on|off")
