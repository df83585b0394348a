"""PCI virtio devices in Python, served to an unmodified QEMU over vfio-user."""

__version__ = "0.2.0"
