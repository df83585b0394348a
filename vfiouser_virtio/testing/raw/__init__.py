"""Raw driver kit: driver side of a virtqueue and client side of a vfio-user socket, for anything a test wants to write.

::

    ring           `RawRing`: what split and packed rings have in common; `RawRam`, the guest memory that they lie in
    split, packed  each structure of the ring by itself (hostile), and whole chains (well-behaved)
    bring_up       the register writes of a driver, from reset to DRIVER_OK, for any way to a register
    messages       vfio-user messages with any header
    client         `RawClient`: any bytes and file descriptors to a server, and what comes back

The fuzzer, the conformance checks, the benchmarks and `testing.driver` stand on it. The reference model of the tests
(``tests/support/ring_model``) and the Python guest (`vfiouser_virtio.guest`) are written apart from it, and from each
other: a mistake in one is found by the others.
"""
