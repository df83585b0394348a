"""The netdevs that a user can choose from, by QEMU's names for them, and what can be put before any of them."""

import inspect
import socket
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from vfiouser_virtio.backends.net.boot.netdev import BootNetdev
from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.pcap import PcapNetdev
from vfiouser_virtio.backends.net.recording import RecordedNetdev
from vfiouser_virtio.backends.net.shaping import Shaped
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.backends.net.user import UserNetdev
from vfiouser_virtio.backends.net.wire import WireNetdev
from vfiouser_virtio.errors import ConfigError


def _parameters(constructor: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those that have a name only: the options."""
    parameters = inspect.signature(constructor).parameters.values()
    return [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _hub(
    *,
    hub: Annotated[str, "name of the hub, such as lan: devices with the same name are on one network"],
    isolated: Annotated[bool, "reach only ports that are not isolated, and be reached by those only"] = False,
    wire: socket.socket | None = None,
) -> Netdev:
    """A hub's port; with ``wire`` the hub is in another process, which has been told the rest."""
    return HubNetdev(hub=hub, isolated=isolated) if wire is None else WireNetdev(wire, f"hub {hub}")


_SHAPE = _parameters(Shaped)
_RECORDING = [
    parameter.replace(default=None) if parameter.default is parameter.empty else parameter
    for parameter in _parameters(RecordedNetdev)
    if parameter.name != "clock"
]


def _with_common_options(constructor: Callable[..., Netdev]) -> Callable[..., Netdev]:
    """A constructor of the same netdev with the options of `Shaped` and `RecordedNetdev`.

    They stand before it where one of their options is given; recorded is what the guest sends and gets to see.
    """

    def make(**options: Any) -> Netdev:
        shape = {each.name: options.pop(each.name) for each in _SHAPE if each.name in options}
        recording = {each.name: options.pop(each.name) for each in _RECORDING if each.name in options}
        if recording and recording.get("dump") is None:
            raise ConfigError("dump-maxlen and dump-limit go with dump=PATH")
        netdev = constructor(**options)
        try:
            if shape:
                netdev = Shaped(netdev, **shape)
            if recording:
                netdev = RecordedNetdev(netdev, **recording)
        except BaseException:
            netdev.close()
            raise
        return netdev

    parameters = [*_parameters(constructor), *_SHAPE, *_RECORDING]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what inspect looks for
    make.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    make.__qualname__ = constructor.__qualname__
    return make


_CONSTRUCTORS: dict[str, Callable[..., Netdev]] = {
    "user": UserNetdev,
    "tap": TapNetdev,
    "stream": StreamNetdev,
    "dgram": DgramNetdev,
    "hub": _hub,
    "pcap": PcapNetdev,
    "boot": BootNetdev,
    "null": NullNetdev,
}
NETDEVS: Mapping[str, Callable[..., Netdev]] = {
    name: _with_common_options(constructor) for name, constructor in _CONSTRUCTORS.items()
}
"""For `virtio.options.OneOf`: their constructors' parameters are their options."""
