"""`python -m vfiouser_virtio.vm`: fetch what is missing, say where it is, try KVM; with `qemu …`, run that QEMU."""

import argparse
import os
import shlex
import sys

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm import find_qemu, guest_image
from vfiouser_virtio.vm.accel import choose_accel


def main() -> int:
    """Set up QEMU and the guest. Exit status 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m vfiouser_virtio.vm",
        description="Fetch QEMU 10.1 or newer and a small Linux guest into the user's cache, where they are missing. "
        "Try, once per boot of this machine, whether the guest boots on KVM, so that no later command has to.",
        epilog="With `qemu` as the first argument, run that QEMU with all further arguments.",
    )
    parser.add_argument("--kernel", metavar="SUITE|FILE", help="a Debian suite, or a kernel image (default: trixie)")
    if sys.argv[1:2] == ["qemu"]:
        return _run_qemu(sys.argv[2:])
    options = parser.parse_args()
    try:
        qemu = find_qemu()
        image = guest_image(options.kernel)
        accel = choose_accel(qemu, image)
    except (ConfigError, OSError) as error:  # an OSError is of the cache: full, or not ours to write
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in qemu.env.items())
    print(f"qemu {'.'.join(map(str, qemu.version))}: {settings}{shlex.join(qemu.argv_prefix)}")
    print(f"kernel {image.kernel.version}: {image.kernel.image}")
    print(f"initramfs: {image.initramfs}")
    print(f"accelerator: {accel}")
    return 0


def _run_qemu(arguments: list[str]) -> int:
    """Become QEMU; come back only when there is none."""
    try:
        qemu = find_qemu()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # S606: no shell is what we mean.
    return os.execvpe(qemu.argv_prefix[0], [*qemu.argv_prefix, *arguments], qemu.environment)  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
