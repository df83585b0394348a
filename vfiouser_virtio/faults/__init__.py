"""Faults on purpose: devices that lie to their driver, by a seed and a schedule, with a log of what they did when.

::

    FaultSpec ──▶ FaultPlan ──▶ faults.core.FaultyCore         status, features, configuration, interrupts
    as written    what is due        ├── faults.rings          used rings, by the core's virtqueue factory
                  and its log        └── faults.pci.FaultyPci  registers and capabilities of PCI

A device does not know of it, and one that is not asked for faults runs none of this. Each name is imported when it is
first asked for: every server reads `fault_spec`, for its options, and starts without the rest.
"""

TYPE_CHECKING = False  # typing's, which type checkers know by its name
if TYPE_CHECKING:
    from vfiouser_virtio.faults.catalogue import FAULTS as FAULTS
    from vfiouser_virtio.faults.declaration import Argument as Argument
    from vfiouser_virtio.faults.declaration import Fault as Fault
    from vfiouser_virtio.faults.declaration import Place as Place
    from vfiouser_virtio.faults.fault_spec import FaultSpec as FaultSpec
    from vfiouser_virtio.faults.plan import FaultPlan as FaultPlan
    from vfiouser_virtio.faults.plan import Hit as Hit
    from vfiouser_virtio.faults.plan import replay as replay
    from vfiouser_virtio.faults.spec import parse_fault as parse_fault
else:
    _HOMES = {
        "FAULTS": "catalogue",
        "Argument": "declaration",
        "Fault": "declaration",
        "Place": "declaration",
        "FaultPlan": "plan",
        "Hit": "plan",
        "replay": "plan",
        "FaultSpec": "fault_spec",
        "parse_fault": "spec",
    }
    __all__ = sorted(_HOMES)

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
