"""A guest whose RAM is two pieces, side by side: Linux's buffers cross from one into the other."""

from pathlib import Path

import pytest
from support.vm_devices import MIB, booted_from_options, difference, fill, sparse

from vfiouser_virtio import vm
from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.vring import Chain

pytestmark = pytest.mark.qemu

# In the middle of a huge page, so that both halves of that can be one buffer. Together they are what -m says.
FIRST_KIB = 200 * 1024 + 12
SECOND_KIB = 384 * 1024 - FIRST_KIB
BOUNDARY = FIRST_KIB << 10

SHARED, PRIVATE = "memory-backend-memfd,id={},size={}K,share=on", "memory-backend-ram,id={},size={}K,share=off"


@pytest.mark.parametrize(
    ("kinds", "rings"),
    [
        pytest.param((SHARED, SHARED), "", id="memfds"),
        pytest.param((SHARED, SHARED), ",packed=on,indirect-desc=off", id="memfds-packed", marks=pytest.mark.variant),
        pytest.param((SHARED, PRIVATE), ",packed=on", id="memfd-and-none", marks=pytest.mark.variant),
        pytest.param((PRIVATE, PRIVATE), "", id="no-memfd", marks=pytest.mark.variant),
    ],
)
async def test_buffers_cross_regions(
    qemu: vm.Qemu,
    guest_image: vm.GuestImage,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kinds: tuple[str, str],
    rings: str,
) -> None:
    """The guest reads most of its RAM from one disk, in one request of its own, and writes it to another one."""
    size = 220 * MIB
    source, target = tmp_path / "source", tmp_path / "target"
    fill(source, size)
    sparse(target, size)
    crossing = {"read": 0, "written": 0}
    complete = Chain.complete

    def counted(self: Chain, written: int | None = None) -> None:
        for index, (address, length) in enumerate(self.ranges):
            if address < BOUNDARY < address + length:
                crossing["written" if index >= self.writable_from else "read"] += 1
        complete(self, written)

    monkeypatch.setattr(Chain, "complete", counted)
    extra_args = ["-object", kinds[0].format("mem0", FIRST_KIB), "-object", kinds[1].format("mem1", SECOND_KIB)]
    extra_args += ["-numa", "node,memdev=mem0", "-numa", "node,memdev=mem1"]
    async with booted_from_options(
        qemu,
        guest_image,
        [f"blk,path={source}{rings}", f"blk,path={target}{rings}"],
        # The guest must not keep the pieces apart as we do; and `private` adds no memory of its own.
        memory="private",
        memory_size="384M",
        extra_args=extra_args,
        append="numa=off",
    ) as machine:
        for function in machine.functions.values():
            with pytest.raises(Unmapped):
                function.memory.check(384 * MIB, 1, write=False)
            assert any(region.end == BOUNDARY for region in function.memory.regions)
        crossing.update(read=0, written=0)
        await machine.run("echo always >/sys/kernel/mm/transparent_hugepage/enabled")
        await machine.run(f"dd if=/dev/vda of=/dev/vdb bs={size} count=1 iflag=direct oflag=direct", timeout=120)
        assert await difference(source, target, size) == ""
        assert crossing["read"] > 0
        assert crossing["written"] > 0
        await machine.check_quiet(caplog)
