"""``python -m vfiouser_virtio`` is the command ``vfiouser-virtio``."""

import gc
import sys

from vfiouser_virtio import late_modules


def main() -> int:
    """Run the command, as `cli.main` does."""
    gc.disable()  # what an import makes stays: to look for garbage among it takes 2 ms
    late_modules.install()
    from vfiouser_virtio.cli import main as command

    gc.freeze()  # nor later
    gc.enable()
    return command()


if __name__ == "__main__":
    sys.exit(main())
