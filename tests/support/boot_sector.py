"""A boot sector of ours: says so on the serial port, then reads and writes its disk for ever through the firmware.

It runs in real mode without any operating system, so it is there within a second of QEMU's start, and every access is
made by SeaBIOS' own virtio driver. Per round it reads 32 KiB from a moving place, writes them at `WRITE_SECTOR`, and
prints a dot; an error prints ``!`` and stops.
"""

import struct

GREETING = b"booted from our disk "
LOAD_ADDRESS = 0x7C00
SECTORS = 64
WRITE_SECTOR = 4096
# The first sector read is rounds * 64, modulo 2048 sectors: the first MiB of the disk.
READ_MASK = 0x07C0


def boot_sector() -> bytes:
    """512 bytes, assembled by hand: (label,) marks a place, (opcode bytes, label, kind) refers to one."""
    program: list[tuple[bytes, str, str] | str | bytes] = [
        b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0\xbc\x00\x7c\xfb",  # cli; ds = es = ss = 0; sp = 0x7c00; sti
        (b"\x88\x16", "drive", "abs"),  # mov [drive], dl
        (b"\xbe", "greeting", "abs"),  # mov si, greeting
        "print",
        b"\xac\x84\xc0",  # lodsb; test al, al
        (b"\x74", "round", "rel"),  # jz round
        b"\xba\xf8\x03\xee",  # mov dx, 0x3f8; out dx, al
        (b"\xeb", "print", "rel"),
        "round",
        (b"\xb4\x42\x8a\x16", "drive", "abs"),  # extended read
        (b"\xbe", "read_packet", "abs"),
        b"\xcd\x13",
        (b"\x72", "failed", "rel"),
        (b"\xb8\x00\x43\x8a\x16", "drive", "abs"),  # extended write
        (b"\xbe", "write_packet", "abs"),
        b"\xcd\x13",
        (b"\x72", "failed", "rel"),
        (b"\x83\x06", "read_lba", "abs"),  # add word [read_lba], 64
        struct.pack("<B", SECTORS),
        (b"\x81\x26", "read_lba", "abs"),  # and word [read_lba], READ_MASK
        struct.pack("<H", READ_MASK),
        b"\xb0.\xba\xf8\x03\xee",  # mov al, '.'; out
        (b"\xeb", "round", "rel"),
        "failed",
        b"\xb0!\xba\xf8\x03\xee\xfa\xf4",  # mov al, '!'; out; cli; hlt
        "greeting",
        GREETING + b"\0",
        "drive",
        b"\0",
        "read_packet",
        struct.pack("<BBHHH", 16, 0, SECTORS, 0, 0x1000),
        "read_lba",
        struct.pack("<Q", 0),
        "write_packet",
        struct.pack("<BBHHHQ", 16, 0, SECTORS, 0, 0x1000, WRITE_SECTOR),
    ]
    labels: dict[str, int] = {}
    code = b""
    for final in (False, True):
        code = b""
        for item in program:
            if isinstance(item, str):
                labels[item] = len(code)
            elif isinstance(item, bytes):
                code += item
            else:
                opcode, label, kind = item
                size = 2 if kind == "abs" else 1
                target = labels.get(label, 0)
                value = LOAD_ADDRESS + target if kind == "abs" else target - len(code + opcode) - size
                code += opcode + (value.to_bytes(size, "little", signed=kind == "rel") if final else bytes(size))
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"
