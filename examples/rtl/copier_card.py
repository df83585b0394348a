"""Card of examples/rtl/copier.v as the guest sees it: its registers are those of the simulated design.

`simulate.py` simulates it; docs/rtl-bridge.md tells how the two come together.
"""

from vfiouser_virtio import main
from vfiouser_virtio.pci import Identity, bar, interrupts
from vfiouser_virtio.pci.bridge import Bridge


class CopierCard(Bridge):
    identity = Identity(vendor=0x1234, device=0x5AC1, class_code=0x120000)
    irq = interrupts(1, msix_bar=1)

    regs = bar(0, size=0x1000)


if __name__ == "__main__":
    main(CopierCard)
