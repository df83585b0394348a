"""What both ends of a vfio-user connection have: messages from bytes, sockets, VERSION's JSON."""
