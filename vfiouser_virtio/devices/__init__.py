"""The device types that come with the package, one module each; importing this registers them all on the bus."""

from vfiouser_virtio.devices import blk, console, rng

SHIPPED = (blk, console, rng)
"""The modules, in the order of their names; a test compares them with the folder."""
