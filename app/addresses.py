"""Where requests go that others had a say in: which addresses anybody may be sent to."""

from __future__ import annotations

import ipaddress
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Ways to write an IPv4 address as IPv6: a gateway on the way would turn them back.
_TRANSLATED = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))


def address_of(found: tuple[Any, ...]) -> Address:
    """Of one answer of getaddrinfo."""
    return ipaddress.ip_address(str(found[4][0]).partition("%")[0])


def is_public(address: Address) -> bool:
    """Whether anybody on the internet has this address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast
