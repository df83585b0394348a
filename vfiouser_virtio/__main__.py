"""``python -m vfiouser_virtio`` is the command ``vfiouser-virtio``."""

import gc
import sys


def main() -> int:
    """Run the command, as `cli.main` does."""
    gc.disable()  # what an import makes stays: to look for garbage among it takes 2 ms
    from vfiouser_virtio.cli import main as command

    gc.freeze()  # nor later
    gc.enable()
    return command()


if __name__ == "__main__":
    sys.exit(main())
