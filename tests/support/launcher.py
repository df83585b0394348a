"""``python launcher.py PARENT ARGUMENTS…``: the command ``vfiouser-virtio``, killed when process PARENT ends."""

import sys

del sys.path[0]  # this folder: a device file may import modules that are called as some here

from vfiouser_virtio.parent_death import end_with_parent  # noqa: E402 - with the path of the command

end_with_parent(int(sys.argv.pop(1)))

from vfiouser_virtio import briefly  # noqa: E402 - first of all, not to outlive anybody

# Before others read it: a busy machine, on which a name is removed late, is no file system that hangs.
briefly.TIMEOUT_S = 60.0

from vfiouser_virtio.__main__ import main  # noqa: E402 - reads it

sys.exit(main())
