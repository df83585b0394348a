"""Options ``fault``, ``fault-seed``, ``fault-log``, ``fault-control``, ``fault-stopped`` of a device, in effect."""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.transports.pci import VirtioPci

if TYPE_CHECKING:
    from vfiouser_virtio.audit import AuditLog
    from vfiouser_virtio.faults import FaultPlan
    from vfiouser_virtio.faults.control import FaultControl
    from vfiouser_virtio.serving.device_setup import CommonOptions


class DeviceFaults:
    """Faults of the device ``name``, if its options ask for any. Raises ConfigError, and DeviceError for a control.

    Only what is asked for is imported: other devices start without it.
    """

    def __init__(self, options: "CommonOptions", name: str) -> None:
        self._options = options
        self._name = name
        self._plan = self._make_plan()
        self._control = self._open_control()

    def function(self, audit: "AuditLog | None") -> Callable[..., VirtioPci]:
        """What makes the PCI function, as `VirtioPci` does; ``audit`` gets what its driver does."""
        if self._plan is None and audit is None:
            return VirtioPci
        if self._plan is not None and audit is None:
            from vfiouser_virtio.faults.pci import FaultyPci

            return partial(FaultyPci, faults=self._plan, control=self._control)
        from vfiouser_virtio.audit import audited

        assert audit is not None
        if self._plan is None:
            return audited(audit, self._name)
        from vfiouser_virtio.serving.audited_faults import AuditedFaultyPci

        return partial(audited(audit, self._name, AuditedFaultyPci), faults=self._plan, control=self._control)

    def open_log(self) -> None:
        """Open the log: the last thing that can go wrong, since what is there may be the only log of a rare fault."""
        if self._plan is not None and self._options.fault_log is not None:
            from vfiouser_virtio.serving.fault_log import fault_log

            self._plan.log.write_to(fault_log(self._options.fault_log))

    def close(self) -> None:
        """Close what a function has that could not be made."""
        if self._control is not None:
            self._control.close()

    def _open_control(self) -> "FaultControl | None":
        if self._plan is None or self._options.fault_control is None:
            return None
        from vfiouser_virtio.faults.control import FaultControl

        return FaultControl(self._options.fault_control, self._plan, self._name)

    def _make_plan(self) -> "FaultPlan | None":
        options = self._options
        if not options.fault:
            if options.is_faulty:
                raise ConfigError(
                    "fault-log, fault-seed, fault-control and fault-stopped are for fault=NAME, and there is none"
                )
            return None
        for spec in options.fault:
            if spec.name != "replay":
                continue
            if options.fault_seed is not None:
                raise ConfigError(f"fault-seed={options.fault_seed}: {spec.text} has its own: leave one of them out")
            if options.fault_log is not None and os.path.realpath(spec.which) == os.path.realpath(options.fault_log):
                raise ConfigError(f"fault-log={options.fault_log} is the log of {spec.text}: write to another file")
        from vfiouser_virtio.faults import FaultPlan

        running = not options.fault_stopped
        return FaultPlan(options.fault, seed=options.fault_seed, device=self._name, running=running)
