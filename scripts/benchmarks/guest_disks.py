"""Disks that a guest compares: ours, QEMU's own, qemu-storage-daemon's, and any other."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Options
from benchmarks.server import server
from benchmarks.usage import Usage
from vfiouser_virtio.serving.qemu_command import qemu_device
from vfiouser_virtio.vm import VmError, debian, programs

OURS, BUILT_IN, VHOST_USER = "ours", "built-in", "vhost-user-blk"
SIZE = 256 << 20
_SUITE = "trixie-backports"


@dataclass(frozen=True, slots=True)
class GuestDevice:
    """Device of the guest: its -device argument, the options that this one needs, and who serves it."""

    name: str
    device: str | dict[str, object]
    arguments: tuple[str, ...] = ()
    usage: Usage | None = None
    """Of the process that serves it, where that is one of its own."""


def make_image(path: Path) -> Path:
    """A file that is in the page cache, and whose blocks exist."""
    piece = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(SIZE // len(piece)):
            file.write(piece)
        # Its write-back is over before anything is measured.
        os.fsync(file.fileno())
    return path


def guest_disks(options: Options, folder: Path, sockets: Path, stack: ExitStack) -> list[GuestDevice]:
    """Start what serves them, all on one file; variants of ours have copies, because a disk of ours locks its file.

    ``folder`` is on a disk, ``sockets`` has a short path.
    """
    image = make_image(folder / "disk")
    disks = [_ours(OURS, image, "", stack), _built_in(image), _vhost_user(image, sockets, stack)]
    for number, variant in enumerate(options.variants):
        copy = shutil.copyfile(image, folder / f"variant{number}")
        disks.append(_ours(f"{OURS} {variant}", copy, variant, stack))
    disks += [GuestDevice(f"peer {number + 1}", argument) for number, argument in enumerate(options.peers)]
    for number, peer in enumerate(options.peers):
        options.note(f"peer {number + 1} is {peer}")
    return disks


def in_slots(disks: Sequence[GuestDevice]) -> list[dict[str, object] | str]:
    """Their -device arguments, with a place on the bus for each, as QEMU makes those in JSON after all others."""
    return [_in_slot(disk.device, f"{slot:#x}") for slot, disk in enumerate(disks, start=8)]


def _in_slot(device: str | dict[str, object], slot: str) -> str | dict[str, object]:
    if isinstance(device, str) and device.startswith("{"):
        device = dict(json.loads(device))
    return f"{device},addr={slot}" if isinstance(device, str) else device | {"addr": slot}


def _ours(name: str, image: Path, more: str, stack: ExitStack) -> GuestDevice:
    running = stack.enter_context(server([f"blk,path={image},serial=ours{f',{more}' if more else ''}"]))
    return GuestDevice(name, dict(qemu_device(name.translate(_ID), running.paths[0])), usage=running.usage)


def _built_in(image: Path) -> GuestDevice:
    node = f"driver=file,node-name=built-in,locking=off,filename={image}"
    return GuestDevice(BUILT_IN, "virtio-blk-pci,drive=built-in,serial=built-in", ("-blockdev", node))


def _vhost_user(image: Path, sockets: Path, stack: ExitStack) -> GuestDevice:
    root = debian.fetch("qemu-storage-daemon", ["qemu-utils"], suite=_SUITE, what="qemu-storage-daemon", megabytes=12)
    socket, pidfile = sockets / "vhost-user.sock", sockets / "vhost-user.pid"
    command = programs.argv(root, "qemu-storage-daemon")
    command += ["--blockdev", f"driver=file,node-name=disk,locking=off,filename={image}"]
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
    command += ["--export", export, "--pidfile", str(pidfile)]
    process = stack.enter_context(subprocess.Popen(command))
    stack.callback(process.terminate)
    # It writes its number when the socket is there.
    while not pidfile.exists():
        if process.poll() is not None:
            raise VmError(f"qemu-storage-daemon ended with status {process.returncode}")
        time.sleep(0.01)
    arguments = ("-chardev", f"socket,id=vhost-user,path={socket}")
    return GuestDevice(VHOST_USER, "vhost-user-blk-pci,chardev=vhost-user", arguments, Usage(process.pid))


# What QEMU does not take in an id.
_ID = {ord(character): "-" for character in " ,=./:"}
