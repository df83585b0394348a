"""Report of an audit as text and JSON."""

import json
import textwrap

from vfiouser_virtio.audit.findings import AuditLog, BrokenRule


def as_text(log: AuditLog) -> str:
    """One paragraph for each finding, and a last line with counts."""
    lines = [_paragraph(found.device, finding) for found in log.devices.values() for finding in found.all()]
    lines += [
        _wrapped(f"{found.device}: ", f"{watch} was switched off by a bug in it: {error}", indent="")
        for found in log.devices.values()
        for watch, error in found.switched_off.items()
    ]
    total = sum(len(found.by_rule) for found in log.devices.values())
    musts = log.must_broken
    devices = f"{len(log.devices)} device{'' if len(log.devices) == 1 else 's'}"
    if total:
        lines.append(f"audit of {devices}: {musts} MUST and {total - musts} SHOULD rules of virtio 1.4 broken\n")
    else:
        lines.append(f"audit of {devices}: no broken rule\n")
    return "".join(lines)


def _paragraph(device: str, finding: BrokenRule) -> str:
    rule = finding.rule
    times = "once" if finding.count == 1 else f"{finding.count} times"
    runs = ", ".join(map(str, sorted(finding.runs)))
    times += f" (driver run{'s' if len(finding.runs) > 1 else ''} {runs})"
    head = f"{device}: the driver broke {rule.id}, {rule.keyword}, {times}; virtio 1.4, {rule.section}\n"
    text = head + _wrapped("rule: ", rule.text) + _wrapped("seen: ", finding.first)
    return text + _wrapped("faults: ", finding.faults) if finding.faults else text


def _wrapped(label: str, text: str, indent: str = "    ") -> str:
    first = indent + label
    return textwrap.fill(text, 118, initial_indent=first, subsequent_indent=" " * len(first)) + "\n"


def as_json(log: AuditLog) -> str:
    """All that is known, for programs."""
    devices = [
        {
            "device": found.device,
            "findings": [
                {
                    "rule": finding.rule.id,
                    "keyword": finding.rule.keyword,
                    "section": finding.rule.section,
                    "text": finding.rule.text,
                    "count": finding.count,
                    "runs": sorted(finding.runs),
                    "seen": finding.first,
                    **({"faults": finding.faults} if finding.faults else {}),
                }
                for finding in found.all()
            ],
            **({"switched-off": found.switched_off} if found.switched_off else {}),
        }
        for found in log.devices.values()
    ]
    return json.dumps({"must-broken": log.must_broken, "devices": devices}, indent=2) + "\n"
