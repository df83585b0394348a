"""Virtual machine to try devices in: QEMU with vfio-user-pci, a small Linux guest, and a way to run commands in it.

What is missing is fetched into the user's cache, without root. Nothing here knows the devices.
"""

from vfiouser_virtio.vm.agent import CommandResult
from vfiouser_virtio.vm.firmware import ipxe_program, ovmf_arguments, unified_kernel_stub
from vfiouser_virtio.vm.guest import Guest, VmError, boot_guest
from vfiouser_virtio.vm.host_tools import host_tool
from vfiouser_virtio.vm.initramfs import GuestImage, build_root_tree, guest_image
from vfiouser_virtio.vm.kernel import Kernel
from vfiouser_virtio.vm.qemu import Qemu, find_qemu
from vfiouser_virtio.vm.qmp import QmpClient, QmpClosedError, QmpError

__all__ = [
    "CommandResult",
    "Guest",
    "GuestImage",
    "Kernel",
    "Qemu",
    "QmpClient",
    "QmpClosedError",
    "QmpError",
    "VmError",
    "boot_guest",
    "build_root_tree",
    "find_qemu",
    "guest_image",
    "host_tool",
    "ipxe_program",
    "ovmf_arguments",
    "unified_kernel_stub",
]
