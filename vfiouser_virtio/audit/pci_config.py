"""Watch of PCI config space: virtio's capabilities, and the window in one of them (virtio 1.4, 4.1.4.1 and 4.1.4.9)."""

from collections.abc import Callable

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import must
from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio.pci import CAP, CFG_CAP, CfgType

_WINDOW = "4.1.4.9.2 PCI configuration access capability"

CAPABILITY = must(
    "pci/capability-write",
    "4.1.4.1 Virtio Structure PCI Capabilities",
    "No field of virtio's capabilities is written, but those of the window (PCI_CFG).",
    "writes to config space where those capabilities are",
)
ALIGNED = must(
    "pci/window-aligned", _WINDOW, "The window's offset is a multiple of its length.", "the window at each access by it"
)
RANGE = must(
    "pci/window-range",
    _WINDOW,
    "pci_cfg_data is accessed only while the window is 1, 2 or 4 bytes of a structure of the device.",
    "the window at each access by it, and the structures that other capabilities name",
)

_CAP, _CFG = offsets(CAP), offsets(CFG_CAP)
_CAPABILITY_LIST, _VENDOR_SPECIFIC = 0x34, 9
_MAX_CAPABILITIES = 48
"""As many as config space has room for: a list that is a loop ends."""

BarAccess = Callable[[int, int, bytes | None], None]
"""(offset, length, data written, or None for a read) of an access to the device's registers through the window."""


class PciConfigWatch:
    """Watch of one function's config space; ``window`` is told of the register accesses that go through it."""

    def __init__(self, function: PciFunction, bar: int, findings: Findings) -> None:
        self._function = function
        self._bar = bar
        self._findings = findings
        self._structures: list[tuple[int, int, int]] = []
        self._capabilities: list[tuple[int, int]] = []
        self._window = 0
        self._is_set = False
        self._find()

    def _find(self) -> None:
        """Where the capabilities are, as a driver finds them."""
        load = self._function.config.load
        at = load(_CAPABILITY_LIST, 1)
        for _ in range(_MAX_CAPABILITIES):
            if not at:
                return
            if load(at, 1) == _VENDOR_SPECIFIC:
                kind, bar, offset, length = (
                    load(at + _CAP[name][0], _CAP[name][1]) for name in ("cfg_type", "bar", "offset", "length")
                )
                if kind == CfgType.PCI:
                    self._window = at
                else:
                    self._structures.append((bar, offset, length))
                    self._capabilities.append((at, at + load(at + _CAP["cap_len"][0], 1)))
            at = load(at + 1, 1)

    def reset(self) -> None:
        """The function is reset, and its config space with it."""
        self._is_set = False

    def written(self, offset: int, data: bytes) -> tuple[int, int] | None:
        """The driver is about to write config space; the (offset, length) of the BAR that it reaches by the window."""
        for start, end in self._capabilities:
            if offset < end and start < offset + len(data):
                self._findings.broke(CAPABILITY, f"wrote {data.hex()} at {offset:#x} of config space")
        at = self._window + _CFG["pci_cfg_data"][0]
        if self._window and offset < at and self._window < offset + len(data):
            self._is_set = True
        return self._reached(offset, len(data))

    def read(self, offset: int, count: int) -> tuple[int, int] | None:
        """The driver is about to read config space; the rest as with `written`."""
        # Who reads all of config space, as lspci does, means no access by a window that was never set.
        return self._reached(offset, count) if self._is_set else None

    def _reached(self, offset: int, count: int) -> tuple[int, int] | None:
        at, size = _CFG["pci_cfg_data"]
        if not self._window or not (offset < self._window + at + size and self._window + at < offset + count):
            return None
        load = self._function.config.load
        bar, start, length = (load(self._window + _CFG[name][0], _CFG[name][1]) for name in ("bar", "offset", "length"))
        seen = f"accessed pci_cfg_data with the window at {start:#x}+{length:#x} of BAR {bar}"
        if length not in (1, 2, 4) or not any(
            bar == where and begin <= start and start + length <= begin + room
            for where, begin, room in self._structures
        ):
            self._findings.broke(RANGE, seen)
            return None
        if start % length:
            self._findings.broke(ALIGNED, seen)
            return None
        return (start, length) if bar == self._bar else None
