"""The device in `PciFunction`'s docstring is run as it stands there."""

import inspect
import textwrap
from typing import Any

from support.pci import EVENTFD, TRIGGER, Client, EventFds, events

from vfiouser_virtio.pci import Bar, Identity, PciFunction
from vfiouser_virtio.vfio_device import Buffer, PciIrq, PciRegion


def example() -> str:
    lines = (inspect.getdoc(PciFunction) or "").splitlines()
    start = next(n for n, line in enumerate(lines) if line.endswith("::")) + 1
    block = []
    for line in lines[start:]:
        if line and not line.startswith(" "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block))


def test_the_scratch_device_works(eventfds: EventFds) -> None:
    names: dict[str, Any] = {"Bar": Bar, "Buffer": Buffer, "Identity": Identity, "PciFunction": PciFunction}
    exec(example(), names)
    function = names["Scratch"]().function
    function.connected(Client())
    ours, sent = eventfds.make()
    function.set_irqs(PciIrq.MSIX, EVENTFD | TRIGGER, 0, 1, b"", [sent])
    assert function.region_read(PciRegion.CONFIG, 0, 4) == b"\x34\x12\x78\x56"
    function.region_write(PciRegion.CONFIG, 4, b"\x06\x00")
    function.region_write(PciRegion.BAR0, 0x123, memoryview(b"scratch"))
    assert function.region_read(PciRegion.BAR0, 0x120, 12) == b"\0\0\0scratch\0\0"
    assert events(ours) == 1
    function.disconnected()
