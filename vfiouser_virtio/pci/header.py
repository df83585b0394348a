"""Type-0 header of an endpoint (PCI Local Bus 3.0 §6.2), and which of its bits a client may write."""

from typing import Any

from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import STD_NUM_BARS, TYPE0_HEADER, PciCommand, PciStatus

_NOTHING: dict[str, Any] = {
    **dict.fromkeys(offsets(TYPE0_HEADER), 0),
    "base_address": [0] * STD_NUM_BARS,
    "reserved": [0] * 7,
}
_COMMAND = (
    PciCommand.IO
    | PciCommand.MEMORY
    | PciCommand.MASTER
    | PciCommand.PARITY
    | PciCommand.SERR
    | PciCommand.INTX_DISABLE
)
_ERRORS = (
    PciStatus.PARITY
    | PciStatus.SIG_TARGET_ABORT
    | PciStatus.REC_TARGET_ABORT
    | PciStatus.REC_MASTER_ABORT
    | PciStatus.SIG_SYSTEM_ERROR
    | PciStatus.DETECTED_PARITY
)
# The last three are scratch registers for firmware and the guest's kernel: the function does nothing with them.
_WRITABLE = TYPE0_HEADER.build(
    _NOTHING | {"command": _COMMAND, "cache_line_size": 0xFF, "latency_timer": 0xFF, "interrupt_line": 0xFF}
)
_WRITE_1_TO_CLEAR = TYPE0_HEADER.build(_NOTHING | {"status": _ERRORS})


def define_header(config: ConfigSpace, identity: Identity, interrupt_pin: int) -> None:
    """Put the header of a single-function endpoint without BARs, ROM and capabilities into config space."""
    header = _NOTHING | {
        "vendor_id": identity.vendor,
        "device_id": identity.device,
        "revision_id": identity.revision,
        "class_prog": identity.class_code & 0xFF,
        "class_device": identity.class_code >> 8,
        "subsystem_vendor_id": identity.subsystem_vendor,
        "subsystem_id": identity.subsystem,
        "interrupt_pin": interrupt_pin,
    }
    config.define(0, TYPE0_HEADER.build(header), writable=_WRITABLE, write_1_to_clear=_WRITE_1_TO_CLEAR)
