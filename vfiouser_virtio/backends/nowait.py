"""File systems that keep the promise of RWF_NOWAIT, and of a first try within io_uring_enter(): never to wait."""

import os
import stat

from vfiouser_virtio.fds import file_system

# f_type of statfs(2), from linux/magic.h: ext2 to ext4, XFS, Btrfs, F2FS, tmpfs, hugetlbfs. Either they do what NOWAIT
# says or they refuse it. FUSE with direct I/O and network file systems go on and ask a server, which may be hung.
_KEEP_IT = {0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x01021994, 0x958458F6}


def keeps_nowait(fd: int) -> bool:
    """Whether the file is known never to wait where it is told not to: a block device, or one of a local file system.

    Asks the file system, which may wait: for set-up only.
    """
    return stat.S_ISBLK(os.fstat(fd).st_mode) or file_system(fd)[0] & 0xFFFF_FFFF in _KEEP_IT
