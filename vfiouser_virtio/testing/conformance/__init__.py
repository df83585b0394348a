"""Conformance of any vfio-user virtio server: checks of the rules of virtio 1.4 and of the protocol ("conformance").

::

    async for result in run_checks(Wire("/run/x/blk0.sock"), CHECKS.values()):
        print(text_line(result))

It knows the device only through the client and the guest's side, which are written apart from the device's. Importing
this package registers every check; each module has those of one area.
"""

from vfiouser_virtio.protocols.virtio.device_type import Exercise  # noqa: I001 - the order of those below means something
from vfiouser_virtio.testing.conformance import (  # noqa: F401 - each registers its checks, in this order
    protocol_version,
    protocol_messages,
    protocol_commands,
    protocol_memory,
    pci,
    common_cfg,
    initialization,
    queue_reset,
    rings,
    packed,
    notifications,
    interrupts,
    suspend,
    net,
)
from vfiouser_virtio.testing.conformance.bench import NO_VIRTIO
from vfiouser_virtio.testing.conformance.checks import CHECKS, Check
from vfiouser_virtio.testing.conformance.document import document
from vfiouser_virtio.testing.conformance.not_checked import IN_PART, NOT_CHECKED
from vfiouser_virtio.testing.conformance.report import (
    as_json,
    as_junit,
    list_json,
    list_text,
    summary,
    text_line,
)
from vfiouser_virtio.testing.conformance.runner import run_check, run_checks
from vfiouser_virtio.testing.conformance.verdicts import GOOD, Result, Verdict
from vfiouser_virtio.testing.conformance.wire import Wire

__all__ = [
    "CHECKS",
    "GOOD",
    "IN_PART",
    "NOT_CHECKED",
    "NO_VIRTIO",
    "Check",
    "Exercise",
    "Result",
    "Verdict",
    "Wire",
    "as_json",
    "as_junit",
    "document",
    "list_json",
    "list_text",
    "run_check",
    "run_checks",
    "summary",
    "text_line",
]
