"""Boot server in this process: a network with one host, which gives out addresses (DHCP) and files (TFTP)."""
