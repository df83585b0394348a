"""Capability list (PCI Local Bus 3.0 §6.7), and the generic capabilities that are put on it."""

from functools import cache
from typing import NamedTuple

from vfiouser_virtio.pci.config_space import ConfigSpace, OnRead, OnWrite
from vfiouser_virtio.protocols.codec import Schema, offsets
from vfiouser_virtio.protocols.pci import (
    CAP_HEADER,
    CFG_SPACE_SIZE,
    EXP_CAP,
    EXP_CAP_VERSION,
    MSI_CAP,
    MSI_FLAGS_64BIT,
    MSIX_CAP,
    PM_CAP,
    PM_CAP_VERSION,
    STD_HEADER_SIZEOF,
    TYPE0_HEADER,
    VNDR_CAP_HEADER,
    CapId,
    ExpDevCap,
    ExpDevCap2,
    ExpDevCtl,
    ExpDevCtl2,
    ExpDevSta,
    ExpLnkCap,
    ExpLnkCap2,
    ExpLnkCtl,
    ExpLnkCtl2,
    ExpLnkSta,
    MsiFlags,
    MsixFlags,
    PciStatus,
    PmCtrl,
)

_HEADER = offsets(TYPE0_HEADER)
_NEXT, _ = offsets(CAP_HEADER)["next"]
_X1 = 1 << 4  # PCI_EXP_LNKCAP_MLW, the link's width, is bits 9:4


class Capability(NamedTuple):
    """Element of the capability list; offsets in masks and hooks count from its first byte, the capability id.

    ``data`` is the whole capability; its second byte (next) is filled in by the chain. ``writable`` and
    ``write_1_to_clear`` are masks that may be shorter than ``data``: the rest is read-only. ``on_read(offset, count)``
    runs before bytes are fetched and may `ConfigSpace.store` new ones, ``on_write(offset, data)`` runs with the raw
    bytes after the writable bits were stored.
    """

    data: bytes
    writable: bytes = b""
    write_1_to_clear: bytes = b""
    on_read: OnRead | None = None
    on_write: OnWrite | None = None


class CapabilityChain:
    """Lays capabilities out from 0x40 on, in the order in which they are added, and links them."""

    def __init__(self, config: ConfigSpace) -> None:
        self._config = config
        self._link, _ = _HEADER["capability_list"]
        self._free = STD_HEADER_SIZEOF

    def add(self, capability: Capability) -> int:
        """Append a capability and return its offset. Raises ValueError when the 192 bytes are used up."""
        offset, config = self._free, self._config
        if offset + len(capability.data) > CFG_SPACE_SIZE:
            raise ValueError(
                f"capability {capability.data[0]:#x} at {offset:#x} does not fit below {CFG_SPACE_SIZE:#x}"
            )
        unlinked = bytearray(capability.data)
        unlinked[_NEXT] = 0
        config.define(
            offset, bytes(unlinked), writable=capability.writable, write_1_to_clear=capability.write_1_to_clear
        )
        if capability.on_read is not None or capability.on_write is not None:
            config.hook(offset, len(unlinked), on_read=capability.on_read, on_write=capability.on_write)
        config.define(self._link, bytes([offset]))
        if offset == STD_HEADER_SIZEOF:
            status, size = _HEADER["status"]
            config.define_bits(status, PciStatus.CAP_LIST.to_bytes(size, "little"))
        self._link = offset + _NEXT
        self._free = offset + len(unlinked) + 3 & ~3
        return offset


def vendor_capability(
    body: bytes, *, writable: bytes = b"", on_read: OnRead | None = None, on_write: OnWrite | None = None
) -> Capability:
    """A vendor-specific capability (PCI 3.0 appendix H): ``body`` follows id, next and length.

    ``writable`` and the offsets of the hooks count from the capability's first byte like everywhere, so that a schema
    of the whole capability gives them.
    """
    header = VNDR_CAP_HEADER.build({"id": CapId.VNDR, "next": 0, "length": VNDR_CAP_HEADER.sizeof() + len(body)})
    return Capability(header + body, writable, on_read=on_read, on_write=on_write)


def msi_capability(vectors: int, *, on_read: OnRead, on_write: OnWrite) -> Capability:
    """MSI (PCI 3.0 §6.8.1) with 64-bit addresses and a mask bit for each of ``vectors``, a power of two up to 32.

    The pending bits are ``on_read``'s to store.
    """
    offered = vectors.bit_length() - 1 << 1
    fields = dict.fromkeys(offsets(MSI_CAP), 0)
    fields |= {"id": CapId.MSI, "flags": offered | MSI_FLAGS_64BIT | MsiFlags.MASKBIT}
    message = {"address_lo": 0xFFFF_FFFC, "address_hi": 0xFFFF_FFFF, "data_64": 0xFFFF}
    return Capability(
        MSI_CAP.build(fields),
        writable=_mask(MSI_CAP, flags=MsiFlags.ENABLE | MsiFlags.QSIZE, mask_64=(1 << vectors) - 1, **message),
        on_read=on_read,
        on_write=on_write,
    )


def msix_capability(vectors: int, *, bar: int, table: int, pba: int, on_write: OnWrite) -> Capability:
    """MSI-X (PCI 3.0 §6.8.2): ``vectors`` of them, table and pending bits at these offsets of ``bar``."""
    fields = {"id": CapId.MSIX, "next": 0, "flags": vectors - 1, "table": table | bar, "pba": pba | bar}
    return Capability(
        MSIX_CAP.build(fields),
        writable=_mask(MSIX_CAP, flags=MsixFlags.ENABLE | MsixFlags.MASKALL),
        on_write=on_write,
    )


def pm_capability(*, no_soft_reset: bool, on_write: OnWrite) -> Capability:
    """Power management (PCI PM 1.2 §3.2) with D0 and D3hot and without PME.

    The power state is not in the write mask: an unsupported state must be discarded, which only ``on_write`` can.
    """
    fields = {
        "id": CapId.PM,
        "next": 0,
        "pmc": PM_CAP_VERSION,
        "ctrl": PmCtrl.NO_SOFT_RESET if no_soft_reset else 0,
        "ppb_extensions": 0,
        "data_register": 0,
    }
    return Capability(PM_CAP.build(fields), on_write=on_write)


def exp_capability(*, flr: bool, on_write: OnWrite | None) -> Capability:
    """PCI Express (PCIe 4.0 §7.5.3), version 2: an endpoint on a 2.5 GT/s x1 link, optionally with FLR.

    The link exists so that a guest finds a plausible one; QEMU zeroes its registers on a root bus. FLR's bit is not in
    the write mask: it reads as zero always.
    """
    fields = dict.fromkeys(offsets(EXP_CAP), 0) | {
        "id": CapId.EXP,
        "flags": EXP_CAP_VERSION,
        "devcap": ExpDevCap.RBER | (ExpDevCap.FLR if flr else 0),
        "devctl": ExpDevCtl.RELAX_EN | ExpDevCtl.NOSNOOP_EN | ExpDevCtl.READRQ_512B,  # power-on values of §7.5.3.4
        "lnkcap": ExpLnkCap.SLS_2_5GB | _X1,
        "lnksta": ExpLnkSta.CLS_2_5GB | ExpLnkSta.NLW_X1,
        "devcap2": ExpDevCap2.COMP_TMOUT_DIS,
        "lnkcap2": ExpLnkCap2.SLS_2_5GB,
        "lnkctl2": ExpLnkCtl2.TLS_2_5GT,
    }
    reporting = ExpDevCtl.CERE | ExpDevCtl.NFERE | ExpDevCtl.FERE | ExpDevCtl.URRE
    transfers = ExpDevCtl.RELAX_EN | ExpDevCtl.PAYLOAD | ExpDevCtl.NOSNOOP_EN | ExpDevCtl.READRQ
    return Capability(
        EXP_CAP.build(fields),
        writable=_mask(
            EXP_CAP,
            devctl=reporting | transfers,
            lnkctl=ExpLnkCtl.ASPMC | ExpLnkCtl.RCB | ExpLnkCtl.CCC | ExpLnkCtl.ES,
            devctl2=ExpDevCtl2.COMP_TMOUT_DIS,
        ),
        write_1_to_clear=_mask(EXP_CAP, devsta=ExpDevSta.CED | ExpDevSta.NFED | ExpDevSta.FED | ExpDevSta.URD),
        on_write=on_write,
    )


@cache  # the same for each of a hundred devices, and a quarter of what it takes to make one
def _mask(schema: Schema, **bits: int) -> bytes:
    """A mask over a capability: these bits of these fields, no bit of the others."""
    return bytes(schema.build(dict.fromkeys(offsets(schema), 0) | bits))
