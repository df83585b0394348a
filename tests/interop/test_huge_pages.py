"""A guest whose RAM is on huge pages of 2 MiB: it works, and when its QEMU has left the next one has the pages."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import trio
from support.huge_pages import HUGE_PAGE, free, huge_pages
from support.vm_devices import MIB, difference, fill, sparse

from vfiouser_virtio import serve, vm

pytestmark = pytest.mark.qemu

RAM = 256 * MIB


@contextmanager
def hugetlbfs(folder: Path) -> Iterator[str]:
    """QEMU's backend for files on hugetlbfs, which is mounted for as long as that."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "hugetlbfs", "none", folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"hugetlbfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield f"memory-backend-file,id=mem,mem-path={folder},size=256M,share=on"
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def memfd(_: Path) -> Iterator[str]:
    yield "memory-backend-memfd,id=mem,size=256M,share=on,hugetlb=on,hugetlbsize=2M"


@pytest.mark.parametrize("backend", [memfd, pytest.param(hugetlbfs, marks=pytest.mark.variant)])
async def test_one_qemu_after_another(
    qemu: vm.Qemu,
    guest_image: vm.GuestImage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    backend: Callable[[Path], AbstractContextManager[str]],
) -> None:
    source, target = tmp_path / "source", sparse(tmp_path / "target", 8 * MIB)
    fill(source, 8 * MIB)
    with huge_pages(RAM // HUGE_PAGE), backend(tmp_path / "huge") as ram:
        # There are as many as one guest takes: of pages that stay mapped the next QEMU would say so, and end.
        available = free()
        async with serve(f"blk,path={source}", f"blk,path={target}") as served:
            for _ in range(2):
                async with vm.boot_guest(
                    qemu,
                    guest_image,
                    devices=served.qemu_devices,
                    memory="private",
                    memory_size="256M",
                    extra_args=["-object", ram, "-machine", "memory-backend=mem"],
                ) as guest:
                    await guest.run("dd if=/dev/zero of=/dev/vdb bs=1M oflag=direct; sync", timeout=120)
                    await guest.run("dd if=/dev/vda of=/dev/vdb bs=1M iflag=direct oflag=direct && sync", timeout=120)
                    for function in served.functions:
                        assert len(function.memory.check(HUGE_PAGE, RAM - HUGE_PAGE, write=True)) == 1
                assert await difference(source, target, 8 * MIB) == ""
                with trio.fail_after(60):
                    while any(function.memory.regions for function in served.functions) or free() < available:
                        await trio.sleep(0.05)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
