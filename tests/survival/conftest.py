"""The real QEMU and the small Linux guest, fetched and built once."""

import pytest

from vfiouser_virtio import vm


@pytest.fixture(scope="session")
def qemu() -> vm.Qemu:
    return vm.find_qemu()


@pytest.fixture(scope="session")
def guest_image() -> vm.GuestImage:
    return vm.guest_image()
