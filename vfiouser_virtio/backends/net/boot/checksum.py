"""Internet checksum (RFC 1071)."""

from vfiouser_virtio.backends.net.segmentation import ones_complement_sum


def internet_checksum(*parts: bytes | bytearray | memoryview) -> int:
    """What completes these bytes; 0 where they are complete. Every part but the last has an even length."""
    return -sum(map(ones_complement_sum, parts)) % 0xFFFF
