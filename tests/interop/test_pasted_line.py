"""The QEMU line that ``serve`` prints, pasted into a shell, with a guest image of one's own."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vfiouser_virtio import vm
from vfiouser_virtio.vm import newc

pytestmark = pytest.mark.qemu


def test_the_printed_line_runs_in_a_shell(qemu: vm.Qemu, guest_image: vm.GuestImage, tmp_path: Path) -> None:
    wrapper = tmp_path / "bin" / "qemu-system-x86_64"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(qemu.argv_prefix)} "$@"\n')
    wrapper.chmod(0o755)
    disk = tmp_path / "my disk.img"
    disk.write_bytes(b"not seen before".ljust(1 << 20, b"\0"))
    serve = [sys.executable, "-m", "vfiouser_virtio", "serve", "--device", f"blk,path={disk}", "--device", "rng"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        printed = ""
        for line in server.stdout:
            if line.startswith("ready"):
                break
            if not line.startswith("device "):
                printed += line
        # My own guest: it says on its console what is on the disk, and ends.
        say = "console=ttyS0 quiet panic=-1"
        mine = f" -display none -no-reboot -serial stdio -kernel {guest_image.kernel.image} -append {shlex.quote(say)}"
        mine += f" -initrd {_initrd(guest_image, tmp_path)}"
        environment = qemu.environment | {"PATH": f"{wrapper.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", printed.rstrip() + mine],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        server.terminate()
    assert "not seen before" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


def _initrd(guest_image: vm.GuestImage, folder: Path) -> Path:
    """The test guest's, with another /sbin/init laid over it: archives may follow one another."""
    init = b"#!/bin/sh\nhead -c 15 /dev/vda >/dev/console\necho >/dev/console\nexec busybox poweroff -f\n"
    initrd = folder / "initrd"
    initrd.write_bytes(guest_image.initramfs.read_bytes() + newc.pack([newc.file("sbin/init", init, 0o755)]))
    return initrd
