"""Virtio and PCI devices in Python, served to an unmodified QEMU over vfio-user.

A device is a class, and its file is a command::

    from vfiouser_virtio import Device, main, queue

    class Pattern(Device):
        device_id = 4
        requestq = queue(max_size=8)

        async def run(self) -> None:
            async for chain in self.requestq:
                chain.writable.write(b"\\xde\\xad\\xbe\\xef")
                chain.complete()

    if __name__ == "__main__":
        main(Pattern)

The names for authors of devices are here, each imported from its own module when it is first asked for: a test of a
device needs no server, and ``vfiouser-virtio --help`` neither trio nor devices. docs/writing-a-device.md explains them.
"""

__version__ = "0.2.0"

TYPE_CHECKING = False  # typing's, which type checkers know by its name; importing that would be all of this import
if TYPE_CHECKING:
    from vfiouser_virtio.cli.device_main import main as main
    from vfiouser_virtio.errors import AuthorError as AuthorError
    from vfiouser_virtio.errors import ConfigError as ConfigError
    from vfiouser_virtio.errors import DeviceError as DeviceError
    from vfiouser_virtio.errors import GuestError as GuestError
    from vfiouser_virtio.serving.serve import Serving as Serving
    from vfiouser_virtio.serving.serve import serve as serve
    from vfiouser_virtio.transports.pci import VirtioPci as VirtioPci
    from vfiouser_virtio.virtio.device import Device as Device
    from vfiouser_virtio.virtio.device import queue as queue
    from vfiouser_virtio.virtio.offer import Offer as Offer
    from vfiouser_virtio.virtio.options import Duration as Duration
    from vfiouser_virtio.virtio.options import OneOf as OneOf
    from vfiouser_virtio.virtio.options import Size as Size
    from vfiouser_virtio.virtio.pins import Pinned as Pinned
    from vfiouser_virtio.virtio.queue import Queue as Queue
    from vfiouser_virtio.vring.chain import Chain as Chain
else:
    _HOMES = {
        "cli.device_main": ("main",),
        "errors": ("AuthorError", "ConfigError", "DeviceError", "GuestError"),
        "serving.serve": ("Serving", "serve"),
        "transports": ("VirtioPci",),
        "virtio": ("Chain", "Device", "Offer", "Pinned", "Queue", "queue"),
        "virtio.options": ("Duration", "OneOf", "Size"),
    }
    __all__ = sorted(name for names in _HOMES.values() for name in names)

    def __getattr__(name: str) -> object:
        from importlib import import_module

        for module, names in _HOMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
