"""A Linux guest with every kind of device, all of them served in a sandbox, in one process and in one each."""

import hashlib
from pathlib import Path

import pytest
import trio
from support.command import serve_process

from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device

pytestmark = [pytest.mark.qemu, pytest.mark.once]


@pytest.mark.parametrize("how", [(), pytest.param(("--processes",), marks=pytest.mark.variant)], ids=["one", "each"])
async def test_a_linux_guest(how: tuple[str, ...], qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(b"not seen before".ljust(8 << 20, b"\0"))
    devices = [
        *("blk,path=disk.img", "rng", "console,chardev=file:console.log,name=org.example", "balloon", "input"),
        *("net,hub=lan", "net,hub=lan"),
    ]
    words = ["--sandbox", "--log-level=warning", *how, *(word for each in devices for word in ("--device", each))]
    async with serve_process(*words, folder=tmp_path) as served:
        sockets = {Path(path).stem: path for path in served.sockets}
        plugged = [qemu_device(name, path) for name, path in sockets.items()]
        async with vm.boot_guest(qemu, guest_image, devices=plugged) as guest:
            shell = guest.run
            assert (await shell("head -c 15 /dev/vda")).output == "not seen before"
            await shell("dd if=/dev/urandom of=/dev/vda bs=64k seek=1 count=16 oflag=direct")
            written = (await shell("dd if=/dev/vda bs=64k skip=1 count=16 iflag=direct 2>/dev/null | md5sum")).output
            assert (await shell("head -c 100 /dev/hwrng | wc -c")).output.strip() == "100"
            await shell("echo said > /dev/$(ls /sys/class/virtio-ports)")
            names = (await shell("cat /sys/bus/virtio/devices/*/device")).output.split()
            assert sorted(int(name, 16) for name in names) == [1, 1, 2, 3, 4, 5, 18]
        with (tmp_path / "disk.img").open("rb") as disk:
            disk.seek(1 << 16)
            assert hashlib.md5(disk.read(1 << 20)).hexdigest() in written
        with trio.fail_after(60):
            while (tmp_path / "console.log").read_bytes() != b"said\n":
                await trio.sleep(0.01)
        assert (await served.terminate(), served.log.read_text()) == (0, "")
