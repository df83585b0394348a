"""Error of a device's process as its keeper finds it."""


class RelayError(Exception):
    """Something that the device's process cannot have sent if it is in its right mind."""
