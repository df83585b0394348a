"""Driver audit: what the driver of a device did against virtio 1.4's rules for drivers, watched while it runs.

::

    guest's driver ──▶ AuditedVirtioPci: registers, config space ──▶ watches: status, features, queues, vectors, …
                 └───▶ AuditedSplitRing, AuditedPackedRing ────────▶ watches: rings, then chains of the device's type
                                                                            │
                                                       Findings: each rule once, with a count and what was seen first

A watch only looks: the device does what it does without one. Each rule is declared once (`rule.must`, `rule.should`),
beside the watch that sees it; `rule.RULES` has them all, `unseen.UNSEEN` those that no device can see.
"""

from vfiouser_virtio.audit.findings import AuditLog, BrokenRule, Findings
from vfiouser_virtio.audit.function import AuditedVirtioPci, audited
from vfiouser_virtio.audit.rule import RULES, Rule

__all__ = ["RULES", "AuditLog", "AuditedVirtioPci", "BrokenRule", "Findings", "Rule", "audited"]
