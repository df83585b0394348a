"""Unified kernel image: one EFI program of a Linux kernel, its initramfs and its command line, for firmware to start.

It is systemd's stub with a section for each of them, as ``ukify`` makes it (UAPI Group, UKI specification 1.0). That
looks for the sections in memory, wherever the firmware has loaded them from.
"""

import struct
from pathlib import Path

_READABLE_DATA = 0x4000_0040  # IMAGE_SCN_MEM_READ | IMAGE_SCN_CNT_INITIALIZED_DATA
_SECTION = struct.Struct("<8sIIIIIIHHI")
# Places in a PE32+ file (Microsoft, "PE Format"), from the signature on.
_COUNT, _OPTIONAL_SIZE, _OPTIONAL = 6, 20, 24
_SECTION_ALIGNMENT, _FILE_ALIGNMENT, _IMAGE_SIZE, _HEADERS_SIZE = (_OPTIONAL + at for at in (32, 36, 56, 60))


def unified_kernel(stub: Path, kernel: Path, initrd: bytes, command_line: str) -> bytes:
    """The program's bytes."""
    program = bytearray(stub.read_bytes())
    (signature,) = struct.unpack_from("<I", program, 0x3C)
    assert program[signature : signature + 4] == b"PE\0\0"

    def field(at: int, kind: str = "I") -> int:
        value: int = struct.unpack_from(f"<{kind}", program, signature + at)[0]
        return value

    for name, data in (
        (b".cmdline", command_line.encode() + b"\0"),
        (b".initrd", initrd),
        (b".linux", kernel.read_bytes()),
    ):
        count, address = field(_COUNT, "H"), field(_IMAGE_SIZE)
        at = signature + _OPTIONAL + field(_OPTIONAL_SIZE, "H") + count * _SECTION.size
        assert at + _SECTION.size <= field(_HEADERS_SIZE), "the stub has no room for another section"
        start = _aligned(len(program), field(_FILE_ALIGNMENT))
        raw = _aligned(len(data), field(_FILE_ALIGNMENT))
        _SECTION.pack_into(program, at, name, len(data), address, raw, start, 0, 0, 0, 0, _READABLE_DATA)
        struct.pack_into("<H", program, signature + _COUNT, count + 1)
        end = _aligned(address + len(data), field(_SECTION_ALIGNMENT))
        struct.pack_into("<I", program, signature + _IMAGE_SIZE, end)
        program += bytes(start - len(program)) + data + bytes(raw - len(data))
    return bytes(program)


def _aligned(number: int, alignment: int) -> int:
    return -(-number // alignment) * alignment
