"""Faults on purpose: devices that lie to their driver, by a seed and a schedule, with a log of what they did when.

::

    FaultSpec ──▶ FaultPlan ──▶ faults.core.FaultyCore         status, features, configuration, interrupts
    as written    what is due        ├── faults.rings          used rings, by the core's virtqueue factory
                  and its log        └── faults.pci.FaultyPci  registers and capabilities of PCI

A device does not know of it, and one that is not asked for faults runs none of this.
"""

from vfiouser_virtio.faults.catalogue import FAULTS as FAULTS
from vfiouser_virtio.faults.declaration import Argument as Argument
from vfiouser_virtio.faults.declaration import Fault as Fault
from vfiouser_virtio.faults.declaration import Place as Place
from vfiouser_virtio.faults.plan import FaultPlan as FaultPlan
from vfiouser_virtio.faults.plan import Hit as Hit
from vfiouser_virtio.faults.plan import replay as replay
from vfiouser_virtio.faults.spec import FaultSpec as FaultSpec
from vfiouser_virtio.faults.spec import parse_fault as parse_fault
