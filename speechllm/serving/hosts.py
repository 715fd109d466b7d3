"""Which hosts are this machine."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
