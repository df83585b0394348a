"""Options of every PCI device of an author's own, beside those that all devices have; and its reports on a signal."""

import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.pci.accesses import UnmodelledPolicy
from vfiouser_virtio.transports.pci_device import SPIN, PciDeviceFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class PciDeviceOptions:
    """Options of what a PCI device of an author's own tells of its driver."""

    unmodelled: Annotated[
        UnmodelledPolicy | None,
        "accesses of registers that are not modelled read as zero and are logged, read as zero, read as all-ones, or "
        "are errors for the client; default: as the class says, which is log",
    ] = None
    spin: Annotated[int, "name a register that the driver has read so often without a change; 0: never"] = SPIN
    burndown: Annotated[
        Path | None,
        "write what the driver touches that is not modelled, and what it never uses, to this file: a line of JSON when "
        "a client leaves, at the end, and on SIGUSR1, up to 64 MiB",
    ] = None


async def report_on_signal(functions: Iterable[object]) -> None:
    """Until cancelled: on SIGUSR1, all PCI devices of authors' own say what was touched."""
    reporting = [function for function in functions if isinstance(function, PciDeviceFunction)]
    if not reporting or threading.current_thread() is not threading.main_thread():
        return
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            for function in reporting:
                function.report("SIGUSR1")
