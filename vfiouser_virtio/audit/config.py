"""Watch of the device-specific configuration: widths, optional fields, writable ones (virtio 1.4, 2.5, 4.1.3)."""

from collections.abc import Mapping, Sequence

from vfiouser_virtio.audit.findings import Findings
from vfiouser_virtio.audit.rule import Rule, must, should
from vfiouser_virtio.audit.watch import Registers, Watch
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio.balloon import BalloonFeature
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.protocols.virtio.console import ConsoleFeature
from vfiouser_virtio.protocols.virtio.device_types import device_type
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.protocols.virtio.net import NetFeature

_CONFIG = "2.5.1 Device Configuration Space"

WIDTH = must(
    "config/width",
    "4.1.3.1 PCI Device Layout",
    "Fields of 8, 16 and 32 bits are accessed as a whole, those of 64 bits in halves of 32, all aligned.",
    "offset and width of each access to the device's configuration",
)
OPTIONAL = must(
    "config/optional",
    _CONFIG,
    "A field that is there only with a feature is accessed only where the device offers that feature.",
    "accesses to such fields, and what the device offers",
)
GENERATION = should(
    "config/generation",
    _CONFIG,
    "config_generation is read before and after a field of more than 32 bits.",
    "both halves of such a field, with no read of config_generation since the reset, or none after it at DRIVER_OK",
)
WRITE = must(
    "config/write",
    "2.5, 5 Device Types (prose)",
    "Only fields that are writable for the driver are written.",
    "writes to the device's configuration",
)
NET_WRITE = must(
    "net/config-write",
    "5.1.4.2 Device configuration layout",
    "No field of a network device's configuration is written.",
    "writes to it",
)
INPUT_WRITE = must(
    "input/config-write",
    "5.8.5.1 Device Initialization",
    "Of an input device's configuration only select and subsel are written.",
    "writes to it",
)
BLK_WRITEBACK = must(
    "blk/writeback-early",
    "5.2.5.1 Device Initialization",
    "writeback is not read before FEATURES_OK.",
    "reads of that field while FEATURES_OK is not set",
)
POISON_EARLY = must(
    "balloon/poison-early",
    "5.5.6.6.1 Page Poison",
    "With PAGE_POISON, poison_val is written before DRIVER_OK.",
    "DRIVER_OK set with no write of poison_val since the reset",
)
POISON_LATE = must(
    "balloon/poison-late",
    "5.5.6.6.1 Page Poison",
    "With PAGE_POISON, poison_val is not changed while DRIVER_OK is set.",
    "writes of poison_val in that status",
)

_WRITE_RULES: Mapping[int, Rule] = {DeviceId.NET: NET_WRITE, DeviceId.INPUT: INPUT_WRITE}
_B, _N, _C, _M = BlkFeature, NetFeature, ConsoleFeature, BalloonFeature
_NEEDS: Mapping[int, Mapping[str, Sequence[int]]] = {
    DeviceId.BLOCK: {
        "size_max": (_B.SIZE_MAX,),
        "seg_max": (_B.SEG_MAX,),
        **dict.fromkeys(("geometry_cylinders", "geometry_heads", "geometry_sectors"), (_B.GEOMETRY,)),
        "blk_size": (_B.BLK_SIZE,),
        **dict.fromkeys(("physical_block_exp", "alignment_offset", "min_io_size", "opt_io_size"), (_B.TOPOLOGY,)),
        "wce": (_B.CONFIG_WCE,),
        "num_queues": (_B.MQ,),
        **dict.fromkeys(("max_discard_sectors", "max_discard_seg", "discard_sector_alignment"), (_B.DISCARD,)),
        **dict.fromkeys(
            ("max_write_zeroes_sectors", "max_write_zeroes_seg", "write_zeroes_may_unmap"), (_B.WRITE_ZEROES,)
        ),
        **dict.fromkeys(
            ("max_secure_erase_sectors", "max_secure_erase_seg", "secure_erase_sector_alignment"), (_B.SECURE_ERASE,)
        ),
        "zoned_model": (_B.ZONED,),
    },
    DeviceId.NET: {
        "mac": (_N.MAC,),
        "status": (_N.STATUS,),
        "max_virtqueue_pairs": (_N.MQ, _N.RSS),
        "mtu": (_N.MTU,),
        **dict.fromkeys(("speed", "duplex"), (_N.SPEED_DUPLEX,)),
        **dict.fromkeys(
            ("rss_max_key_size", "rss_max_indirection_table_length", "supported_hash_types"), (_N.RSS, _N.HASH_REPORT)
        ),
        "supported_tunnel_types": (_N.HASH_TUNNEL,),
    },
    DeviceId.CONSOLE: {
        **dict.fromkeys(("cols", "rows"), (_C.SIZE,)),
        "max_nr_ports": (_C.MULTIPORT,),
        "emerg_wr": (_C.EMERG_WRITE,),
    },
    DeviceId.BALLOON: {"free_page_hint_cmd_id": (_M.FREE_PAGE_HINT,), "poison_val": (_M.PAGE_POISON,)},
}
"""Type to optional field to the features one of which must be offered (5.1.4, 5.2.4, 5.3.4, 5.5.4)."""


class ConfigWatch(Watch):
    """Watch of the configuration of one device, whose fields its type declares."""

    def __init__(self, registers: Registers, findings: Findings) -> None:
        super().__init__(registers, findings)
        self._type = self.core.device.device_id
        schema = device_type(self._type).config
        self._fields = {} if schema is None else offsets(schema)
        self._generation_read = False
        self._half_read: dict[str, set[int]] = {}
        self._after: set[str] = set()
        self._poison_written = False

    def reset(self) -> None:
        """A driver starts anew."""
        self._generation_read = self._poison_written = False
        self._half_read.clear()
        self._after.clear()

    def field_read(self, name: str, value: int) -> None:
        """A read of config_generation covers what was read before it."""
        del value
        if name == "config_generation":
            self._generation_read = True
            self._half_read.clear()
            self._after.clear()

    def field_written(self, name: str, value: int) -> None:
        """At a reset, and at DRIVER_OK."""
        if name != "device_status":
            return
        if not value:
            self.reset()
        elif value & DeviceStatus.DRIVER_OK & ~self.core.status and not self.core.status & DeviceStatus.SUSPEND:
            if self._after:
                self.broke(GENERATION, f"read {', '.join(sorted(self._after))} with no config_generation after it")
                self._after.clear()
            poison = self._type == DeviceId.BALLOON and self.core.driver_features & _M.PAGE_POISON.mask
            if poison and not self._poison_written:
                self.broke(POISON_EARLY, "set DRIVER_OK with no write of poison_val")

    def config_read(self, offset: int, count: int) -> None:
        """Widths, then which fields."""
        self._check_width("read", offset, count)
        for name in self._touched(offset, count):
            self._check_offered("read", name)
            if name == "wce" and self._type == DeviceId.BLOCK and not self.core.status & DeviceStatus.FEATURES_OK:
                self.broke(BLK_WRITEBACK, "read writeback before FEATURES_OK")
            at, size = self._fields[name]
            if size == 8 and count == 4:
                halves = self._half_read.setdefault(name, set())
                halves.add(offset - at)
                if len(halves) == 2:
                    if self._generation_read:
                        self._after.add(name)
                    else:
                        self.broke(GENERATION, f"read {name} with no config_generation before it")

    def config_written(self, offset: int, data: bytes) -> None:
        """Widths, then which fields."""
        self._check_width("wrote", offset, len(data))
        writable = self.core.device.driver_writes
        for name in self._touched(offset, len(data)):
            if name not in writable:
                rule = _WRITE_RULES.get(self._type, WRITE)
                self.broke(rule, f"wrote {data.hex()} to {name}")
                continue
            self._check_offered("wrote", name)
            if name == "poison_val" and self._type == DeviceId.BALLOON:
                self._poison_written = True
                if self.core.status & DeviceStatus.DRIVER_OK:
                    self.broke(POISON_LATE, f"wrote poison_val {data.hex()} after DRIVER_OK")

    def _touched(self, offset: int, count: int) -> list[str]:
        return [name for name, (at, size) in self._fields.items() if at < offset + count and offset < at + size]

    def _check_offered(self, did: str, name: str) -> None:
        needed = _NEEDS.get(self._type, {}).get(name)
        if needed is not None and not any(self.core.device_features >> bit & 1 for bit in needed):
            self.broke(OPTIONAL, f"{did} {name}, which is not there: feature {needed[0]} is not offered")

    def _check_width(self, did: str, offset: int, count: int) -> None:
        for name in self._touched(offset, count):
            at, size = self._fields[name]
            if size in (1, 2, 4):
                right = (offset, count) == (at, size)
            elif size == 8:
                right = count == 4 and offset in (at, at + 4)
            elif self._type == DeviceId.INPUT:  # a union of bytes, and of structures of 16 and 32 bits (5.8.4)
                right = count in (1, 2, 4) and (offset - at) % count == 0
            else:
                right = count == 1  # an array of bytes
            if not right:
                self.broke(WIDTH, f"{did} {count} bytes at {offset:#x}; {name} has {size} at {at:#x}")
                return
