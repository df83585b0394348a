"""Folder that machines boot Linux from over the network: kernel, a small initramfs, and a script of iPXE."""

import hashlib
import shutil
from pathlib import Path

from vfiouser_virtio import vm
from vfiouser_virtio.vm import initramfs, modules, newc, programs
from vfiouser_virtio.vm.command_line import BASE_APPEND

HELLO = "hello from 10.0.2.15, which has its file"
PAYLOAD = bytes((at * 3 + (at >> 8)) & 0xFF for at in range(100_000))

# Linux's own driver has a lease too, and a file by busybox's tftp.
_INIT = f"""\
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec >/dev/console 2>&1
modprobe -a -q virtio_pci virtio_net
ip link set eth0 up
udhcpc -i eth0 -q -n -s /lease
ping -c 1 10.0.2.2
tftp -g -b 1468 -r below/payload -l /payload 10.0.2.2
echo "{hashlib.sha256(PAYLOAD).hexdigest()}  /payload" | sha256sum -c -s && \\
    echo "hello from $(cat /address), which has its file"
poweroff -f
"""
_LEASE = """\
#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo -n "$ip" >/address
"""
_SCRIPT = f"""\
#!ipxe
kernel vmlinuz initrd=initrd {BASE_APPEND}
initrd initrd
boot
"""
# Under UEFI iPXE has no address at first, where its driver is the firmware's.
_AUTOEXEC = """\
#!ipxe
dhcp
imgfetch --name payload below/payload
imgstat payload
echo hello from ${net0/ip}
chain boot.ipxe
"""


def boot_folder(folder: Path, kernel: vm.Kernel) -> Path:
    """Fill a new folder: ``boot.ipxe`` loads Linux, ``autoexec.ipxe`` a file before."""
    assert kernel.modules is not None
    assert kernel.bzimage is not None
    busybox = programs.find_program(initramfs.fetch_tools(), "busybox")
    archive = newc.pack(
        [
            *(newc.directory(path) for path in ("dev", "proc", "sys")),
            newc.char_device("dev/console", 5, 1),
            newc.file("init", _INIT.encode(), 0o755),
            newc.file("lease", _LEASE.encode(), 0o755),
            newc.file("bin/busybox", busybox.read_bytes(), 0o755),
            *modules.module_tree(kernel.modules, kernel.version, ("virtio_pci", "virtio_net")),
        ]
    )
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "payload").write_bytes(PAYLOAD)
    shutil.copy(kernel.bzimage, folder / f"vmlinuz-{kernel.version}")
    (folder / "vmlinuz").symlink_to(f"vmlinuz-{kernel.version}")
    (folder / "initrd").write_bytes(archive)
    (folder / "boot.ipxe").write_text(_SCRIPT)
    (folder / "autoexec.ipxe").write_text(_AUTOEXEC)
    return folder
