"""Wire formats: construct schemas and constants of vfio-user, PCI and virtio. No I/O, no state, nothing else.

The files live in ``protocols/`` at the top of the repository and are imported as ``vfiouser_virtio.protocols``.
Imported under any other name, every enum and schema would exist twice, so that is refused.
"""

if __name__ != "vfiouser_virtio.protocols":
    raise ImportError(
        f"import vfiouser_virtio.protocols instead of {__name__}: under two names there would be two of everything"
    )
