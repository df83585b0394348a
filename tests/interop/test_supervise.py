"""Disks of a Linux guest whose processes are killed while fio verifies: the VM lives, no byte is lost."""

import os
import random
import shlex
import signal
from pathlib import Path

import pytest
import trio
from benchmarks import fio
from support.amounts import Amounts
from support.command import ServeProcess, serve_process
from support.processes import children

from vfiouser_virtio import vm
from vfiouser_virtio.serving.qemu_command import qemu_device

pytestmark = [pytest.mark.qemu, pytest.mark.once]

DISKS = {"split": "packed=off", "packed": "packed=on"}
# It ends at the first piece that is not what it has written, or that is an error, and says so.
LOAD = [
    *("--output-format=terse", "--terse-version=3", "--thread", "--eta=never", "--ioengine=libaio", "--direct=1"),
    *("--iodepth=16", "--rw=randrw", "--bsrange=4k-64k", "--time_based", "--runtime=99999", "--verify=crc32c"),
    *("--verify_fatal=1", "--verify_backlog=32", "--continue_on_error=none", "--fsync=16"),
]


async def test_a_guest_outlives_the_processes_of_its_disks(
    qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path, amounts: Amounts
) -> None:
    rng = random.Random(amounts.device_deaths)
    folder = tmp_path / "host"
    folder.mkdir()
    words: list[str] = []
    for name, options in DISKS.items():
        with (folder / name).open("wb") as image:
            image.truncate(16 << 20)
        words += ["--device", f"blk,path={name},{options}"]
    with_fio = fio.image_with_fio(guest_image, tmp_path)
    async with serve_process("--supervise", *words, folder=folder) as served:
        plugged = [qemu_device(Path(path).stem, path) for path in served.sockets]
        async with vm.boot_guest(qemu, with_fio, devices=plugged) as guest:
            for disk in ("vda", "vdb"):
                load = shlex.join(["fio", f"--output=/tmp/{disk}.out", *LOAD, "--name=load", f"--filename=/dev/{disk}"])
                await guest.run(
                    f"(set +e; {load} >/tmp/{disk} 2>&1 & echo $! >/tmp/{disk}.pid; wait $!; "
                    f"echo >/tmp/{disk}.ended) >/dev/null 2>&1 &",
                    check=True,
                )
            for death in range(amounts.device_deaths):
                before = await progress(guest)
                with trio.fail_after(120):
                    while not all(new > old for new, old in zip(await progress(guest), before, strict=True)):
                        await trio.sleep(rng.random() / 10)
                    await kill_one(served, rng)
                    while served.log.read_text().count("resumed: ") <= death:
                        await trio.sleep(0.01)
            before = await progress(guest)
            with trio.fail_after(120):
                while not all(new > old for new, old in zip(await progress(guest), before, strict=True)):
                    await trio.sleep(0.1)
            for disk in ("vda", "vdb"):
                end = f"kill -KILL $(cat /tmp/{disk}.pid); until [ -e /tmp/{disk}.ended ]; do sleep 0.1; done"
                said = await guest.run(
                    f"cat /tmp/{disk}; [ ! -e /tmp/{disk}.ended ]; {end}; cat /tmp/{disk}", check=True
                )
                assert said.output == ""
            assert (await guest.run("dmesg | grep -iE 'i/o error|reset|timeout|oops:' || true")).output == ""
        assert await served.terminate() == 0
    assert served.log.read_text().count("was ended by SIGKILL") == amounts.device_deaths


async def progress(guest: vm.Guest) -> list[int]:
    """How many sectors of each disk have been read, and written."""
    answer = await guest.run("awk '{ print $3, $7 }' /sys/block/vda/stat /sys/block/vdb/stat", check=True)
    return [int(number) for number in answer.output.split()]


async def kill_one(served: ServeProcess, rng: random.Random) -> None:
    """Kill the process of one of the devices, as soon as there is one."""
    keeper = rng.choice(sorted(children(served.process.pid)))
    while not (processes := children(keeper)):
        await trio.sleep(0.01)
    os.kill(processes[0], signal.SIGKILL)
