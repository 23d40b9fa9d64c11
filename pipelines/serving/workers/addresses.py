"""Network addresses that remote media may come from: those of the public internet."""

import ipaddress

_IPV4_EMBEDDING = tuple(
    ipaddress.ip_network(network)
    for network in (
        "64:ff9b::/96",  # NAT64: an IPv4 address lies in the last 32 bits
        "64:ff9b:1::/48",
        "2002::/16",  # 6to4
        "2001::/32",  # Teredo
        "::/96",  # IPv4-compatible
        "192.88.99.0/24",  # relays of 6to4
    )
)
"""IPv6 networks whose addresses embed IPv4 addresses, which may be private."""


def is_public(address: str) -> bool:
    """Whether `address` is a unicast address of the public internet.

    False for loopback, private, site-local, link-local (such as the metadata services of clouds), shared, multicast,
    reserved and unspecified addresses, for IPv6 that embeds IPv4, and for text that is no address.
    """
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.scope_id is not None or found.is_site_local:
            return False
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
    if any(found in network for network in _IPV4_EMBEDDING):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved and not found.is_unspecified
