"""QEMU's side of a socket: arguments for a shell, libvirt XML, QMP commands (QEMU's ``-device vfio-user-pci``)."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Literal

from vfiouser_virtio.serving.guest_slots import GuestSlot

QemuDevice = Mapping[str, object]
Memory = Literal["shared", "private"]


def qemu_device(name: str, socket_path: str, place: GuestSlot = GuestSlot()) -> QemuDevice:  # noqa: B008 - it is a tuple
    """The ``-device`` argument of one socket. QEMU takes it as JSON only, because ``socket`` is an object."""
    where: dict[str, object] = {} if place.bus is None else {"bus": place.bus}
    if place.slot is not None:
        where["addr"] = place.addr
    if place.multifunction:
        where["multifunction"] = True
    return {"driver": "vfio-user-pci", "id": name, **where, "socket": {"type": "unix", "path": socket_path}}


def qemu_arguments(devices: Sequence[QemuDevice], *, memory: Memory = "shared", size: str = "1G") -> list[str]:
    """All that QEMU needs for the devices; without shared memory everything goes through messages, which is slow."""
    arguments = ["-machine", "q35", "-m", size]
    if memory == "shared":
        backend = f"memory-backend-memfd,id=mem,size={size},share=on"
        arguments = ["-machine", "q35,memory-backend=mem", "-object", backend, "-m", size]
    for device in devices:
        arguments += ["-device", json.dumps(device, separators=(",", ":"))]
    return arguments


def shell_lines(program: str, arguments: Sequence[str]) -> str:
    """A command for a POSIX shell, an option with its value on each line; without a ``program``, just arguments."""
    pairs = [shlex.join(arguments[at : at + 2]) for at in range(0, len(arguments), 2)]
    return " \\\n  ".join([program, *pairs] if program else pairs)


def libvirt_xml(devices: Sequence[QemuDevice]) -> str:
    """What a libvirt domain needs, to be merged into the domain's XML: it has no element of its own for vfio-user."""
    from xml.sax.saxutils import quoteattr  # brings an HTTP and an e-mail client, in a fifth of a server's start

    arguments = [text for device in devices for text in ("-device", json.dumps(device, separators=(",", ":")))]
    lines = [
        "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>",
        "  <memoryBacking>",
        "    <source type='memfd'/>",
        "    <access mode='shared'/>",
        "  </memoryBacking>",
        "  <qemu:commandline>",
        *(f"    <qemu:arg value={quoteattr(argument)}/>" for argument in arguments),
        "  </qemu:commandline>",
        "</domain>",
    ]
    return "\n".join(lines)


def hotplug_commands(devices: Sequence[QemuDevice]) -> str:
    """QMP commands, one per line, that add the devices to a running QEMU.

    Function 0 of a slot comes after its other functions: with it the guest is told.
    """
    last = sorted(devices, key=lambda device: "multifunction" in device)
    return "\n".join(json.dumps({"execute": "device_add", "arguments": device}) for device in last)
