"""Landlock (landlock(7)): rights on files, TCP ports and other processes that are left; names of linux/landlock.h.

Each kernel knows all rights up to those of its ABI version (`known_rights`).
"""

from enum import IntFlag

from construct import Int32sl, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec

# The same numbers on every machine.
NR_CREATE_RULESET, NR_ADD_RULE, NR_RESTRICT_SELF = 444, 445, 446

CREATE_RULESET_VERSION = 1
"""Flag of landlock_create_ruleset(): it returns the ABI version."""
RULE_PATH_BENEATH, RULE_NET_PORT = 1, 2


class AccessFs(IntFlag):
    """Rights on files and folders."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    """Rename or link into another folder. ABI 2."""
    TRUNCATE = 1 << 14
    """ABI 3."""
    IOCTL_DEV = 1 << 15
    """ioctl(2) of devices that are opened from then on. ABI 5."""


OF_FILES = AccessFs.EXECUTE | AccessFs.WRITE_FILE | AccessFs.READ_FILE | AccessFs.TRUNCATE | AccessFs.IOCTL_DEV
"""Rights that a rule for a file, not for a folder, can have."""


class AccessNet(IntFlag):
    """Rights on TCP ports. ABI 4."""

    BIND_TCP = 1 << 0
    CONNECT_TCP = 1 << 1


class Scope(IntFlag):
    """Kinds of things that are only reached in processes with the same rules. ABI 6."""

    ABSTRACT_UNIX_SOCKET = 1 << 0
    SIGNAL = 1 << 1


# struct landlock_ruleset_attr: what is denied unless a rule allows it. The kernel takes a shorter one.
RULESET = Struct("handled_access_fs" / Int64ul, "handled_access_net" / Int64ul, "scoped" / Int64ul)
RULESET_CODEC = codec(RULESET)
# struct landlock_path_beneath_attr, which is packed, and landlock_net_port_attr.
PATH_BENEATH = Struct("allowed_access" / Int64ul, "parent_fd" / Int32sl)
PATH_BENEATH_CODEC = codec(PATH_BENEATH)
NET_PORT = Struct("allowed_access" / Int64ul, "port" / Int64ul)
NET_PORT_CODEC = codec(NET_PORT)


def known_rights(abi: int) -> tuple[AccessFs, AccessNet, Scope]:
    """All rights that a kernel of this ABI version (1 or more) knows."""
    files = AccessFs((1 << 13) - 1)
    for since, right in ((2, AccessFs.REFER), (3, AccessFs.TRUNCATE), (5, AccessFs.IOCTL_DEV)):
        if abi >= since:
            files |= right
    net = AccessNet.BIND_TCP | AccessNet.CONNECT_TCP if abi >= 4 else AccessNet(0)
    return files, net, Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL if abi >= 6 else Scope(0)
