"""Accelerator of a guest: KVM only where a stock kernel boots on it, which /dev/kvm does not promise."""

import json
import os
import selectors
import subprocess
import time
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import debian
from vfiouser_virtio.vm.initramfs import GuestImage
from vfiouser_virtio.vm.qemu import Qemu

# Linux is up in about one second on KVM; nested KVM that is slower than this is no gain over TCG (three seconds).
_PROBE_LIMIT_S = 6.0


def choose_accel(qemu: Qemu, image: GuestImage, wanted: str = "auto") -> str:
    """`kvm` or `tcg`. `auto` and `kvm` ask a probe that boots the guest, once per boot of this machine.

    It blocks for some seconds while it probes. Raises ConfigError for another word, or when KVM is wanted but does not
    work.
    """
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    match wanted:
        case "tcg":
            return "tcg"
        case "kvm" if usable:
            if reason := _kvm_fails(qemu, image):
                raise ConfigError(f"--accel kvm: a stock kernel does not boot on KVM here ({reason}); use tcg or auto")
            return "kvm"
        case "kvm":
            raise ConfigError("--accel kvm: /dev/kvm is not there or may not be opened by this user")
        case "auto":
            return "kvm" if usable and not _kvm_fails(qemu, image) else "tcg"
        case _:
            raise ConfigError(f"--accel {wanted}: expected auto, kvm or tcg")


def _kvm_fails(qemu: Qemu, image: GuestImage) -> str:
    """The probe's result, kept until this machine boots again: empty where KVM works, else what was seen."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    key = f"QEMU {'.'.join(map(str, qemu.version))}, Linux {image.kernel.version}"
    cache = debian.cache_dir() / "kvm-probe.json"
    known = _known_results(cache, boot_id)
    if key not in known:
        debian.progress("trying whether KVM runs here")
        known[key] = fails_on_kvm(qemu, image)
        debian.progress("KVM works" if not known[key] else "KVM does not run a stock kernel here")
        scratch = cache.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"boot_id": boot_id, "fails": known}))
        scratch.replace(cache)
    return known[key]


def _known_results(cache: Path, boot_id: str) -> dict[str, str]:
    try:
        stored = json.loads(cache.read_text())
        return dict(stored["fails"]) if stored["boot_id"] == boot_id else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}


def fails_on_kvm(qemu: Qemu, image: GuestImage) -> str:
    """Boot the guest on KVM and see its agent answer within a few seconds; else QEMU's own line about it, or ours."""
    command = ["-accel", "kvm", "-cpu", "max", "-m", "512M", "-machine", "q35", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-serial", "null", "-serial", "stdio"]
    command += ["-kernel", str(image.kernel.image), "-initrd", str(image.initramfs), "-append", "quiet"]
    deadline = time.monotonic() + _PROBE_LIMIT_S
    seen = b""
    with (
        subprocess.Popen(
            qemu.command(command),
            env=qemu.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        # QEMU stops the machine, but stays, when KVM gives up: "KVM internal error", "emulation failure".
        while b"vm-agent ready" not in seen and b"KVM" not in seen and b"emulation failure" not in seen:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                break
            if not (received := os.read(process.stdout.fileno(), 65536)):
                break
            seen += received
        process.kill()
    if b"vm-agent ready" in seen:
        return ""
    lines = [line.strip() for line in seen.decode(errors="replace").splitlines()]
    told = next((line for line in lines if "KVM" in line or "kvm" in line or "emulation failure" in line), "")
    return told[:200] or f"no sign of life within {_PROBE_LIMIT_S:g} s"
