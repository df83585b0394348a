"""Demo of the main job in a minute: an unmodified QEMU, a stock Linux guest, and devices served by Python.

Everything that is printed in the guest's voice was printed by the guest. Ends by itself, with status 0 if all was well;
with --shell it leaves you in the guest's shell instead.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import trio

from vfiouser_virtio import serve, vm
from vfiouser_virtio.errors import ConfigError

BOLD, DIM, PLAIN = (
    ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("",) * 3
)
DISK_SIZE = 32 << 20


def title(number: int, text: str) -> None:
    """A step of the story."""
    print(f"\n{BOLD}{number}. {text}{PLAIN}", flush=True)


def show(command: str, output: str) -> None:
    """What a user would see who had typed the command."""
    print(f"{DIM}guest# {command}{PLAIN}")
    for shown in output.rstrip().splitlines():
        print(f"   {shown}", flush=True)


async def tell(guest: vm.Guest, command: str) -> str:
    """Run a command in the guest and show it with its output; what fails there ends the demo."""
    result = await guest.run(command, check=True)
    show(command, result.output)
    return result.output


async def demo(folder: Path) -> None:
    """The story, step by step."""
    qemu = await trio.to_thread.run_sync(vm.find_qemu)
    image = await trio.to_thread.run_sync(vm.guest_image)
    disk = folder / "disk.img"
    disk.touch()
    os.truncate(disk, DISK_SIZE)
    console = folder / "console.sock"

    devices = [f"blk,path={disk},serial=made-in-python", "rng", f"console,chardev=unix:{console}"]
    title(1, "This process serves three devices, each on a socket")
    async with serve(*devices) as served:
        for device, endpoint in zip(devices, served.endpoints, strict=True):
            print(f"   --device {device.replace(str(folder) + '/', '')}")
            print(f"      {DIM}at {endpoint.socket_path}{PLAIN}")

        version = ".".join(map(str, qemu.version))
        title(2, f"QEMU {version} boots Linux {image.kernel.version} with them")
        started = time.monotonic()
        async with vm.boot_guest(qemu, image, devices=served.qemu_devices) as guest:
            print(f"   up after {time.monotonic() - started:.1f} s")

            title(3, "What the guest sees")
            await tell(guest, "lspci -nn | grep -i virtio")
            vendors = await tell(guest, "cat /sys/bus/virtio/devices/*/vendor")
            assert vendors.split() == ["0x5000"] * 3, vendors

            title(4, "A file system on our disk, made and read back")
            await tell(guest, "cat /sys/block/vda/serial; echo")
            await tell(guest, "mkfs.ext2 -q /dev/vda 2>&1; mount /dev/vda /mnt && df /mnt")
            await tell(
                guest, "dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches"
            )
            in_guest = await tell(guest, "sha256sum /mnt/file; umount /mnt")
            on_host = await read_from_image(disk, folder)
            print(f"   on the host, out of disk.img: {hashlib.sha256(on_host).hexdigest()}")
            assert in_guest.split()[0] == hashlib.sha256(on_host).hexdigest()

            title(5, "Bytes from our entropy device")
            await tell(guest, "cat /sys/class/misc/hw_random/rng_current; head -c 32 /dev/hwrng | hexdump -C")

            title(6, "A line through our console, each way")
            await talk(guest, console)
            await guest.poweroff()
    title(7, "Two guests on a network in this process")
    await network(qemu, image)
    print(f"\n{BOLD}That was an unmodified QEMU; every register, ring and sector was Python's.{PLAIN}")
    print("Next: scripts/demo --shell, or docs/writing-a-device.md for a device of your own.")


async def network(qemu: vm.Qemu, image: vm.GuestImage) -> None:
    """Two guests, each with a network device of ours on the same hub: one gets a file of the other's."""
    devices = ["net,hub=lan", "net,hub=lan"]
    async with serve(*devices) as served:
        one, other = served.qemu_devices
        for device in devices:
            print(f"   --device {device}")
        async with (
            vm.boot_guest(qemu, image, devices=[one], append="vm.guest=1") as first,
            vm.boot_guest(qemu, image, devices=[other], append="vm.guest=2") as second,
        ):
            await tell(first, "hostname; ping -c 3 guest2 | tail -n 2")
            await second.run("dd if=/dev/urandom of=/tmp/file bs=1M count=8 2>/dev/null; httpd -h /tmp", check=True)
            sent = await tell(second, "hostname; sha256sum /tmp/file")
            got = await tell(first, "wget -q http://guest2/file && sha256sum file")
            assert got.split()[0] == sent.split()[1]
            packets = await tell(first, "cat /sys/class/net/eth0/statistics/rx_packets")
            print(f"   8 MiB in some {int(packets)} packets: segments of up to 64 KiB crossed whole")
            await first.poweroff()
            await second.poweroff()


async def read_from_image(disk: Path, folder: Path) -> bytes:
    """The file that the guest wrote, taken out of the image with e2fsprogs."""
    copy = folder / "copy"
    debugfs = await trio.to_thread.run_sync(vm.host_tool, "debugfs")
    await trio.run_process([*debugfs, "-R", f"dump /file {copy}", str(disk)], capture_stderr=True)
    return copy.read_bytes()


async def talk(guest: vm.Guest, console: Path) -> None:
    """One line from the guest to the socket, and one back."""
    stream = await trio.open_unix_socket(str(console))
    await tell(guest, "stty -F /dev/hvc0 raw -echo; echo 'hello, host' >/dev/hvc0")
    print(f"   on the host, out of the console's socket: {await line(stream)!r}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"hello, guest\n")
        answer = await tell(guest, "head -n 1 /dev/hvc0")
    assert answer == "hello, guest\n", answer
    await stream.aclose()


async def line(stream: trio.SocketStream) -> str:
    """Up to the end of the line."""
    received = b""
    with trio.fail_after(30):
        while not received.endswith(b"\n"):
            received += await stream.receive_some()
    return received.decode().strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--shell", action="store_true", help="leave me in the guest's shell; `poweroff` ends it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        try:
            if options.shell:
                devices = ["--device", f"blk,size={DISK_SIZE}", "--device", "rng", "--device", "console,chardev=pty"]
                return subprocess.run(
                    [sys.executable, "-m", "vfiouser_virtio", "run", *devices], check=False
                ).returncode
            trio.run(demo, Path(folder))
        except ConfigError as error:
            print(f"scripts/demo: {error}", file=sys.stderr)
            return 1
        except vm.VmError as error:
            print(f"scripts/demo: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
