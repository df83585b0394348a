"""The netdevs that a user can choose from, by QEMU's names for them, and what can be put before any of them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.shaping import Shaped
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.backends.net.user import UserNetdev


def _parameters(constructor: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those that have a name only: the options."""
    parameters = inspect.signature(constructor).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _with_common_options(constructor: Callable[..., Netdev]) -> Callable[..., Netdev]:
    """A constructor of the same netdev with the options of `Shaped`, which stands before it where one is given."""
    common = _parameters(Shaped)
    names = {parameter.name for parameter in common}

    def make(**options: Any) -> Netdev:
        shape = {name: options.pop(name) for name in names & options.keys()}
        netdev = constructor(**options)
        try:
            return Shaped(netdev, **shape) if shape else netdev
        except BaseException:
            netdev.close()
            raise

    parameters = [*_parameters(constructor), *common]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what inspect looks for
    make.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    make.__qualname__ = constructor.__qualname__
    return make


NETDEVS: Mapping[str, Callable[..., Netdev]] = {
    name: _with_common_options(constructor)
    for name, constructor in {
        "user": UserNetdev,
        "tap": TapNetdev,
        "stream": StreamNetdev,
        "dgram": DgramNetdev,
        "hub": HubNetdev,
        "null": NullNetdev,
    }.items()
}
"""For `virtio.options.OneOf`: their constructors' parameters are their options."""
