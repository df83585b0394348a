"""Host programs that make and check file systems, for tests and the demo."""

import os
import shutil

from vfiouser_virtio.vm import programs
from vfiouser_virtio.vm.initramfs import fetch_tools


def host_tool(name: str) -> list[str]:
    """The start of a command line that runs a program of e2fsprogs (mke2fs, mkfs.ext4, e2fsck, debugfs).

    It is the machine's own, looked for in the folders of root too, else one fetched into the cache.
    Raises ConfigError when that cannot be.
    """
    if installed := shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"):
        return [installed]
    return programs.argv(fetch_tools(), name)
