"""Generator of docs/conformance.md from the checks."""

from vfiouser_virtio.testing.conformance.checks import CHECKS, Check
from vfiouser_virtio.testing.conformance.not_checked import IN_PART, NOT_CHECKED
from vfiouser_virtio.testing.conformance.peer_verdicts import peer_table

_INTRODUCTION = """\
# What `vfiouser-virtio conform` checks

This page is printed by `python -m vfiouser_virtio.testing.conformance`; do not edit it.

```sh
vfiouser-virtio conform /run/x/blk0.sock
vfiouser-virtio conform --only virtio14/RS1 --only 'vfio-user/*' /run/x/blk0.sock
vfiouser-virtio conform --junit report.xml /run/x/blk0.sock
vfiouser-virtio conform --peer /run/x/net1.sock /run/x/net0.sock
```

It connects to any vfio-user server as a client and drives the device as a guest's driver would, and as none should.
What the server does not offer is not checked. Our own devices offer packed rings and some other features on demand:
`serve --device rng,socket=/run/x/rng0.sock,packed=on,in-order=on,notification-data=on,notif-config-data=on,suspend=on`.

Each check has a connection of its own. Its verdict is *pass*, *fail*, *not applicable* (the device does not have what
the rule is about) or *broke the server*: it closed the connection, stopped answering, or died. After that the run goes
on if the server comes back; what cannot be run any more is *not run*. For what is marked *SHOULD*, or *advice* (no
specification says it), a server that does otherwise gets a note, its verdict is *advice*, and it does not fail. The
exit status is 0 if every verdict is *pass*, *advice* or *not applicable*, and 1 otherwise. A server that ends with its
first client (`serve --once`) is refused. The exit status is 7 when there is nothing to check: no listener, the
server is busy with another client, or it is no vfio-user server.

Rings are exercised with a harmless request: 64 bytes of an entropy device, sector 0 of a disk, a line of text for a
console. It is cut as Linux's driver cuts it (a read of a disk: 16, 512 and 1 bytes) but in the checks of framing, which
cut it otherwise. `virtio14/RQ1` says whether the request itself works; where it does not, the checks that need it are
*not run*, because its failure says nothing of their rules. For other device types they are not applicable, unless
`--exercise FILE.py:NAME` gives a request for them: an `Exercise` of yours in a Python file.

A network device is checked alone, and what it does with frames of the network where `--peer` names the socket of a
second one on its network, as `serve --device net,hub=lan,socket=/run/x/net0.sock --device
net,hub=lan,socket=/run/x/net1.sock` has them. The peer sends what the device is to receive, and sees what it has sent;
nothing else should send there meanwhile. Packed rings are used in all of these checks where the device offers them.

`virtio14/…` are rules of virtio 1.4, `vfio-user/…` those of the vfio-user protocol, and `qemu/…` what QEMU's client
demands beyond it.
"""


def document() -> str:
    """The whole page."""
    lines = [_INTRODUCTION]
    groups: dict[str, list[Check]] = {}
    for check in CHECKS.values():
        groups.setdefault(check.id.partition("/")[0], []).append(check)
    for group, checks in groups.items():
        lines += [f"## {group}", "", "| id | | rule | section | how it is observed | needs |", "|---" * 6 + "|"]
        lines += [_row(check) for check in checks]
        lines.append("")
    lines += peer_table()
    for title, reasons in (("What is not checked", NOT_CHECKED), ("What is checked in part", IN_PART)):
        lines += [f"## {title}", "", *(f"- `{check_id}`: {why}" for check_id, why in reasons.items()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(check: Check) -> str:
    name = check.id.partition("/")[2]
    needs = ", ".join(need.text for need in check.needs)
    return f"| `{name}` | {check.keyword} | {check.rule} | {check.section} | {check.observe} | {needs} |"
