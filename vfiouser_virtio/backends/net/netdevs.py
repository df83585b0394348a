"""The netdevs that a user can choose from, by QEMU's names for them."""

from collections.abc import Callable, Mapping
from typing import Any

from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.backends.net.user import UserNetdev

NETDEVS: Mapping[str, Callable[..., Any]] = {
    "user": UserNetdev,
    "tap": TapNetdev,
    "stream": StreamNetdev,
    "dgram": DgramNetdev,
    "null": NullNetdev,
}
"""For `virtio.options.OneOf`: their constructors' parameters are their options."""
