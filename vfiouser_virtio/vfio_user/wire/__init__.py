"""Wire level of vfio-user, for both ends: messages from bytes, sockets, VERSION's JSON."""
