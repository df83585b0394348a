"""QEMU's command line for a guest (QEMU, qemu(1))."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm.initramfs import GuestImage

# Under TCG a fifth of a boot goes into self tests of the kernel's cryptography, into what jitter entropy measures of
# itself, and into the names of enumerations in trace events: a guest that is here for its devices needs none of it.
_NOT_AT_BOOT = ("jent_mod_init", "crypto_kdf108_init", "init_encrypted", "trace_eval_init", "seg6_init")
# quiet: each character on the console costs time. noreplace-smp: no code is patched for the number of CPUs.
# tsc=reliable: on a busy machine Linux would find that the clocks of two CPUs differ, and patch code that the other one
# runs, which TCG was seen not to survive.
BASE_APPEND = (
    "console=ttyS0 quiet no_timer_check cryptomgr.notests mitigations=off noreplace-smp tsc=reliable "
    f"initcall_blacklist={','.join(_NOT_AT_BOOT)}"
)


def qemu_arguments(
    image: GuestImage | None,
    *,
    devices: Sequence[str | Mapping[str, object]] = (),
    memory: str = "shared",
    memory_size: str = "512M",
    cpus: int = 1,
    machine: str = "q35",
    append: str = "",
    accel: str = "tcg",
    shell: bool = False,
) -> list[str]:
    """QEMU's options for such a guest, all but its serial ports and monitor. ConfigError for another `memory`."""
    arguments = ["-no-user-config", "-nodefaults", "-display", "none"]
    match memory:
        case "shared":
            arguments += ["-object", f"memory-backend-memfd,id=mem,size={memory_size},share=on"]
            arguments += ["-machine", f"{machine},memory-backend=mem", "-m", memory_size]
        case "private":
            arguments += ["-machine", machine, "-m", memory_size]
        case _:
            raise ConfigError(f"memory {memory!r}: expected shared or private")
    # Both accelerators take max: all that the host, or TCG, can do.
    arguments += ["-accel", accel, "-cpu", "max", "-smp", str(cpus)]
    if image is not None:
        words = f"{BASE_APPEND} {'vm.shell' if shell else ''} {append}".split()
        arguments += ["-kernel", str(image.kernel.image), "-initrd", str(image.initramfs), "-append", " ".join(words)]
    for device in devices:
        arguments += ["-device", device if isinstance(device, str) else json.dumps(device)]
    return arguments


def monitor_arguments(version: tuple[int, ...], chardev: str, mode: Literal["control", "readline"]) -> list[str]:
    """QEMU's options for a monitor of its own on a character device: machine protocol, or for people."""
    if version < (11, 1):
        return ["-mon", f"chardev={chardev},mode={mode}"]
    # From 11.1 on QEMU warns about -mon.
    kind = {"control": "monitor-qmp", "readline": "monitor-hmp"}[mode]
    return ["-object", f"{kind},id=monitor-{chardev},chardev={chardev}"]
