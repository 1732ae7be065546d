"""No network but this machine's own: Python runs this first wherever its folder is on PYTHONPATH, as in every
process that the tests start; tests/conftest.py runs it in their own."""

import ipaddress
import socket
import sys


def is_local(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name to look up


def block_network(event: str, arguments: tuple) -> None:
    """Audit hook: sees what every socket of the interpreter is about to do, whichever library asks for it."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        sock, address = arguments
        internet = sock.family in (socket.AF_INET, socket.AF_INET6)
        if internet and address is not None and not is_local(address[0]):
            raise RuntimeError(f"blocked: {event} {address}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not is_local(arguments[0]):
        raise RuntimeError(f"blocked: {event} {arguments[0]}")


sys.addaudithook(block_network)
