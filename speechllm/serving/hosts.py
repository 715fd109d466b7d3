"""Which hosts are this machine."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_own_page(origin: str) -> bool:
    """Whether the page that a header `Origin` names comes from this machine; a malformed one does not."""
    try:
        return is_loopback(urlsplit(origin).hostname or "")
    except ValueError:  # such as http://[::1
        return False
