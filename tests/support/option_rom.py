"""A small expansion ROM for SeaBIOS: it says a few words on the firmware's debug port, and returns."""

import struct

from vfiouser_virtio.pci import Identity

DEBUG_PORT = 0x402
"""QEMU: -device isa-debugcon,iobase=0x402."""


def option_rom(identity: Identity, words: bytes, *, blocks: int = 2) -> bytes:
    """x86 code of type 0 (PCI 3.0, 6.3.3), called at its third byte; all bytes together are 0 modulo 256."""
    pcir = struct.pack(
        "<4sHHHHB3sHHBBH", b"PCIR", identity.vendor, identity.device, 0, 24, 0,
        identity.class_code.to_bytes(3, "little"), blocks, 1, 0, 0x80, 0,
    )  # fmt: skip
    code = 0x1C + len(pcir)
    program = bytes.fromhex("60 fc ba") + struct.pack("<H", DEBUG_PORT)  # pusha; cld; mov dx, port
    program += b"\xbe" + struct.pack("<H", code + len(program) + 3 + 11)  # mov si, words
    program += bytes.fromhex("2e ac 84 c0 74 03 ee eb f7 61 cb")  # cs lodsb; test al, al; jz; out; jmp; popa; retf
    image = bytearray(b"\x55\xaa" + bytes([blocks]) + b"\xeb" + bytes([code - 5]))  # jmp to the program
    image = image.ljust(0x18, b"\0") + struct.pack("<HH", 0x1C, 0) + pcir + program + words + b"\0"
    assert len(image) < 512 * blocks
    image = image.ljust(512 * blocks, b"\0")
    image[-1] = -sum(image) & 0xFF
    return bytes(image)
