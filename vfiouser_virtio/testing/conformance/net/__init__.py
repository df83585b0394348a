"""Checks of network devices (virtio 1.4, 5.1): on one device alone, and on two of one network (``--peer``).

::

    driver    `NetDriver`: raw rings of every queue, commands, packets out and in
    traffic   `Way`: from one device over the network to another, and what comes of each frame
    frames    frames that are made up, and their checksums; `tunnel_frames`: those in UDP tunnels

The other modules have the rules, in the order of the chapter.
"""

from vfiouser_virtio.testing.conformance.net import (  # noqa: F401, I001 - each registers its checks, in this order
    config,
    transmit,
    transmit_traffic,
    tunnel_transmit,
    receive,
    receive_offloads,
    tunnel_receive,
    control,
    filtering,
    steering,
    steering_traffic,
    coalescing,
    statistics,
)
