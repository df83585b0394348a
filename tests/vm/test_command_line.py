"""QEMU's options for a guest."""

import itertools
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import GuestImage, Kernel
from vfiouser_virtio.vm.command_line import qemu_arguments

IMAGE = GuestImage(Kernel("6.12", Path("/k/vmlinux"), None), Path("/k/initramfs"))


def after(arguments: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(arguments) if name == option]


def test_shared_memory_is_a_memfd_that_the_machine_uses() -> None:
    arguments = qemu_arguments(IMAGE, memory="shared", memory_size="256M")
    assert after(arguments, "-object") == ["memory-backend-memfd,id=mem,size=256M,share=on"]
    assert after(arguments, "-machine") == ["q35,memory-backend=mem"]


def test_private_memory_has_no_backend() -> None:
    arguments = qemu_arguments(IMAGE, memory="private", memory_size="256M")
    assert after(arguments, "-object") == []
    assert after(arguments, "-machine") == ["q35"]
    assert after(arguments, "-m") == ["256M"]


def test_other_memory_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected shared or private"):
        qemu_arguments(IMAGE, memory="some")


def test_devices_in_order_as_text_or_json() -> None:
    device = {"driver": "vfio-user-pci", "socket": {"path": "/run/x,y", "type": "unix"}}
    assert after(qemu_arguments(IMAGE, devices=["pcie-root-port", device]), "-device") == [
        "pcie-root-port",
        '{"driver": "vfio-user-pci", "socket": {"path": "/run/x,y", "type": "unix"}}',
    ]


def test_command_line_of_the_kernel() -> None:
    (line,) = after(qemu_arguments(IMAGE, append="pci=nomsi", shell=True), "-append")
    assert line.startswith("console=ttyS0 ")
    assert line.endswith(" vm.shell pci=nomsi")


def test_machine_that_boots_by_its_firmware_has_no_kernel() -> None:
    arguments = qemu_arguments(None)
    assert not {"-kernel", "-initrd", "-append"} & set(arguments)
