"""UEFI firmware for virtual machines (OVMF of edk2), and iPXE as a program of it: Debian's, in the user's cache."""

from pathlib import Path

from vfiouser_virtio.vm import debian


def ovmf_arguments() -> list[str]:
    """QEMU's options for OVMF as firmware; what it stores is forgotten when QEMU ends.

    Raises ConfigError when it cannot be fetched.
    """
    folder = debian.fetch("ovmf", ["ovmf"], what="UEFI firmware", megabytes=6) / "usr/share/OVMF"
    return [
        *("-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={folder}/OVMF_CODE_4M.fd"),
        *("-drive", f"if=pflash,unit=1,format=raw,snapshot=on,file={folder}/OVMF_VARS_4M.fd"),
    ]


def ipxe_program() -> Path:
    """iPXE as an EFI program that uses the firmware's own network driver. Raises ConfigError as `ovmf_arguments`."""
    return debian.fetch("ipxe", ["ipxe"], what="iPXE", megabytes=2) / "usr/lib/ipxe/snponly.efi"


def unified_kernel_stub() -> Path:
    """systemd's EFI program that starts a Linux kernel of its own sections. Raises ConfigError as `ovmf_arguments`."""
    folder = debian.fetch("systemd-boot", ["systemd-boot-efi"], what="systemd's EFI stub", megabytes=1)
    return folder / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
