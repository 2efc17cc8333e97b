"""What can end a request early: an answer with an error status, or no answer at all.

ApiError       becomes the JSON or XML error answer that the real service gives
ConnectionCut  the connection is closed, with or without a TCP reset, and nothing more is sent
"""

from __future__ import annotations

import json
from xml.sax.saxutils import escape

REASONS = {
    304: "notModified",
    400: "invalid",
    401: "authError",
    403: "forbidden",
    404: "notFound",
    409: "conflict",
    410: "gone",
    411: "lengthRequired",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
    499: "clientClosedRequest",
    500: "backendError",
    501: "notImplemented",
    503: "backendError",
}
XML_CODES = {
    401: "AuthenticationRequired",
    403: "AccessDenied",
    404: "NoSuchKey",
    412: "PreconditionFailed",
    429: "SlowDown",
    500: "InternalError",
    503: "ServiceUnavailable",
}


class ApiError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str, xml_code: str | None = None) -> None:
        """Keep the status and message; `xml_code` is the XML API's own word for the error."""
        super().__init__(f"{status} {message}")
        self.status = status
        self.message = message
        self.xml_code = xml_code or XML_CODES.get(status, "InvalidArgument")

    def json_body(self) -> bytes:
        """The body the JSON API sends."""
        reason = REASONS.get(self.status, "backendError")
        detail = {"message": self.message, "domain": "global", "reason": reason}
        error = {"code": self.status, "message": self.message, "errors": [detail]}
        return json.dumps({"error": error}).encode()

    def xml_body(self) -> bytes:
        """The body the XML API sends; clients require all three elements."""
        text = escape(self.message)
        return (
            "<?xml version='1.0' encoding='UTF-8'?>"
            f"<Error><Code>{self.xml_code}</Code><Message>{text}</Message>"
            f"<Details>{text}</Details></Error>"
        ).encode()


class ConnectionCut(Exception):  # noqa: N818 - an event on the wire, often wanted, not an error
    """The connection ends here: scripted by a fault, or because the client went away."""

    def __init__(self, why: str, *, reset: bool = False) -> None:
        """`reset` sends a TCP RST, which the client sees as "connection reset by peer"."""
        super().__init__(why)
        self.reset = reset
