"""The virtual machine itself, without any device of ours."""

import os
import time
from pathlib import Path

import pytest
import trio

from vfiouser_virtio import vm
from vfiouser_virtio.vm.kept_output import FIRST, LAST

pytestmark = pytest.mark.qemu


async def test_commands_reboot_and_poweroff(qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    async with vm.boot_guest(qemu, guest_image) as guest:
        result = await guest.run("echo out; echo err >&2; exit 3")
        assert (result.output, result.status) == ("out\nerr\n", 3)
        # A cancelled command's answer is not taken for the next one's, and what is sent while it runs is not lost.
        for command in ("sleep 2; echo late", "echo later", "echo latest"):
            with trio.move_on_after(0.2):
                await guest.run(command)
        assert (await guest.run("echo next")).output == "next\n"
        assert (await guest.run("")).output == ""
        # Every byte value, and 100 KB of them.
        binary = await guest.run(r"""awk 'BEGIN { for (i = 0; i < 256; i++) printf "\\%03o", i }' >/tmp/escapes
            printf "$(cat /tmp/escapes)" >/tmp/all; set -- $(seq 20); all=$(printf '/tmp/all %.0s' "$@")
            cat $all >/tmp/twenty; twenty=$(printf '/tmp/twenty %.0s' "$@"); cat $twenty""")
        assert binary.raw_output == bytes(range(256)) * 400
        long = await guest.run("wc -c <<'EOF'\n" + "x" * 20_000 + "\nEOF")
        assert long.output == "20001\n"
        assert "Host bridge" in (await guest.run("lspci -nn", check=True)).output
        with pytest.raises(vm.VmError, match=r"(?s)exit status 1 of 'echo why; false':\nwhy"):
            await guest.run("echo why; false", check=True)
        assert (await guest.qmp.execute("query-status"))["status"] == "running"
        with pytest.raises(vm.QmpError, match="not been found"):
            await guest.qmp.execute("no-such-command")

        await guest.run("touch /tmp/before", check=True)
        await guest.reboot()
        assert (await guest.run("test -e /tmp/before")).status == 1
        assert (await guest.qmp.wait_event("RESET"))["data"]["guest"] is True
        assert await guest.poweroff() == 0


async def test_private_memory_two_cpus_and_a_killed_qemu(qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    async with vm.boot_guest(qemu, guest_image, memory="private", memory_size="384M", cpus=2) as guest:
        assert (await guest.run("nproc")).output == "2\n"
        assert await guest.qmp.execute("query-memory-size-summary") == {"base-memory": 384 << 20, "plugged-memory": 0}
        guest.kill()
        with pytest.raises(vm.VmError, match="QEMU ended with status -9"):
            await guest.run("true")
        with pytest.raises(vm.QmpClosedError):
            await guest.qmp.execute("query-status")
        assert await guest.wait_exit() == -9


# `run` says the same of a panic, with the message of this error: cli/test_run.py.
@pytest.mark.variant
async def test_panic_is_seen_at_once_and_shows_the_console(qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    async with vm.boot_guest(qemu, guest_image) as guest:
        started = time.monotonic()
        with pytest.raises(vm.VmError, match=r"(?s)the guest's kernel panicked.*sysrq triggered crash"):
            await guest.run("echo c >/proc/sysrq-trigger", timeout=600)
        assert time.monotonic() - started < 300


async def test_qemu_that_refuses_its_options_says_why(qemu: vm.Qemu, guest_image: vm.GuestImage) -> None:
    with pytest.raises(vm.VmError, match=r"(?s)QEMU did not start: QEMU ended with status 1.*'no-such-device'"):
        async with vm.boot_guest(qemu, guest_image, devices=["no-such-device"]):
            pytest.fail("it started")


async def test_what_qemu_prints_on_and_on_is_bounded(qemu: vm.Qemu) -> None:
    """All that a firmware executes: more than is kept, in a moment."""
    async with vm.boot_guest(qemu, None, accel="tcg", extra_args=["-d", "exec,nochain"]) as guest:
        fd = os.open(f"/proc/{guest.process.pid}/fd/2", os.O_RDONLY)
        try:
            while os.fstat(fd).st_size < 2 * (FIRST + LAST):
                await trio.sleep(0.05)
            guest.kill()
            await guest.wait_exit()
            while os.fstat(fd).st_blocks * 512 > FIRST + LAST + 4096:
                await trio.sleep(0.05)
        finally:
            os.close(fd)
        assert "bytes left out]" in guest.qemu_stderr


async def test_error_of_the_block_comes_out_as_it_is(qemu: vm.Qemu) -> None:
    processes = []

    async def boot_and_fail() -> None:
        async with vm.boot_guest(qemu, None) as guest:
            processes.append(guest.process)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await boot_and_fail()
    assert processes[0].poll() is not None


# test_root_disk.py has the same file system, on a disk of ours.
@pytest.mark.variant
async def test_root_file_system_on_a_disk(qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    vm.build_root_tree(tree, guest_image)
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 64 << 20)
    await trio.run_process([*vm.host_tool("mkfs.ext4"), "-q", "-d", str(tree), str(disk)])
    async with vm.boot_guest(
        qemu,
        guest_image,
        devices=["virtio-blk-pci,drive=disk"],
        append="root=/dev/vda rw",
        extra_args=["-drive", f"if=none,id=disk,file={disk},format=raw"],
    ) as guest:
        assert "/dev/vda on / type ext4 (rw" in (await guest.run("mount")).output
        await guest.run("echo kept >/note", check=True)
        await guest.reboot()
        assert (await guest.run("cat /note")).output == "kept\n"
        await guest.poweroff()
    await trio.run_process([*vm.host_tool("e2fsck"), "-fn", str(disk)], capture_stdout=True, capture_stderr=True)
