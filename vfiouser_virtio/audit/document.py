"""Generator of docs/audit.md from the rules."""

from vfiouser_virtio.audit.peers import PEERS
from vfiouser_virtio.audit.rule import RULES, Rule
from vfiouser_virtio.audit.unseen import UNSEEN

_INTRODUCTION = """\
# Driver audit

This page is printed by `python -m vfiouser_virtio.audit`; do not edit it.

`--audit` of `serve` and `run` watches what drivers do with the devices, and says which of the rules that virtio 1.4 has
for drivers they have broken: each rule once, with its section, how often, and what was seen the first time.

```sh
vfiouser-virtio run --audit --device blk,size=64M --exec 'dd if=/dev/vda of=/dev/null bs=64k count=16'
vfiouser-virtio serve --audit=found.json --device blk,path=disk.img,socket=/run/vm/blk0.sock
```

```
blk0: the driver broke split/indirect-next, MUST, once (driver run 1); virtio 1.4, 2.7.5.3.1 Indirect Descriptors
    rule: INDIRECT and NEXT are not set both.
    seen: queue 0: chain 0x0 has INDIRECT and NEXT
audit of 1 device: 1 MUST and 0 SHOULD rules of virtio 1.4 broken
```

A driver run begins when a driver sets status bits after a reset: firmware that looks for a disk to boot from is run 1,
the system that it boots run 2.

The report comes when the command ends, on stderr or in a file (JSON, if it is called `….json`); `serve` logs each
broken rule when it is first seen. The exit status is 8 when a MUST was broken and nothing else went wrong; a broken
SHOULD is said, and no failure. In Python: `serve(…, audit=AuditLog())` of `vfiouser_virtio.audit`.

The device does what it does without an audit; what is out of order, it refuses or passes over. Two things differ: it is
slower, and offers no ioeventfds, because an eventfd does not say what was written. Rings and requests are looked at
when the device takes them. A packet and its header may be a program's (AF_PACKET with PACKET_VNET_HDR), and are held
against the driver all the same. A watch that has a bug is switched off: the log has its traceback, the report says so,
the device goes on. `--audit` is not for `--processes`.

Of a device that lies on purpose, each finding says how many faults there had been before, and which was the last
([evil.md](evil.md#what-a-driver-does-about-it)).
"""


def document() -> str:
    """The whole page."""
    lines = [_INTRODUCTION]
    groups: dict[str, list[Rule]] = {}
    for rule in RULES.values():
        groups.setdefault(rule.id.partition("/")[0], []).append(rule)
    musts = sum(rule.keyword == "MUST" for rule in RULES.values())
    unseen = sum(len(each.rules) for each in UNSEEN)
    lines += [
        "## Rules",
        "",
        f"{len(RULES)} rules, {musts} of them MUST; {unseen} more are below, which no device sees. Where a",
        'section has "(prose)", the sentence is outside of its normative part.',
        "",
    ]
    for group, rules in groups.items():
        lines += [f"### {group}", "", "| id | | rule | section | what is looked at |", "|---" * 5 + "|"]
        lines += [f"| `{each.id}` | {each.keyword} | {each.text} | {each.section} | {each.look} |" for each in rules]
        lines.append("")
    lines += ["## What is not looked at", "", "| section | rule | why |", "|---" * 3 + "|"]
    lines += [f"| {each.section} | {rule} | {each.why} |" for each in UNSEEN for rule in each.rules]
    lines += ["", "## What drivers do", "", "| driver | date | rule | what was seen, and where in its source |"]
    lines += ["|---" * 4 + "|"]
    lines += [f"| {each.driver} | {each.date} | {each.rule} | {each.seen} |" for each in PEERS]
    return "\n".join(lines).rstrip() + "\n"
