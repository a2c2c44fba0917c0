"""What is on the wire before the first byte is relayed: ClientHello in, alert or PROXY header out.

Law: a leaf. Bytes in, values out; no socket, no trio, no clock, and nothing that knows what a host
is. Everything can be tried at a Python prompt:

    >>> from sniproxy.wire import HelloReader
    >>> reader = HelloReader()
    >>> reader.feed(bytes.fromhex("16 03 01"))      # None: not there yet
    >>> reader.missing
    2
"""

from .addresses import Address, parse_host
from .alert import Alert, alert_record
from .client_hello import ClientHello
from .errors import HelloError, Reason
from .hello import MAX_WIRE, HelloReader, read_at_once
from .proxy_v1 import proxy_v1_header
from .proxy_v2 import TLV, alpn_tlv, authority_tlv, proxy_v2_header, ssl_tlv

__all__ = [
    "MAX_WIRE",
    "TLV",
    "Address",
    "Alert",
    "ClientHello",
    "HelloError",
    "HelloReader",
    "Reason",
    "alert_record",
    "alpn_tlv",
    "authority_tlv",
    "parse_host",
    "proxy_v1_header",
    "proxy_v2_header",
    "read_at_once",
    "ssl_tlv",
]
