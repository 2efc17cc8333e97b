"""What can end a request early: an answer with an error status, or no answer at all."""

from __future__ import annotations

import json

REASONS = {
    400: "invalid",
    401: "authError",
    403: "forbidden",
    404: "notFound",
    410: "gone",
    412: "conditionNotMet",
    416: "requestedRangeNotSatisfiable",
    429: "rateLimitExceeded",
}


class ApiError(Exception):
    """A request that is answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.message = message

    def json_body(self) -> bytes:
        """The body that the JSON API sends."""
        reason = REASONS.get(self.status, "backendError")
        detail = {"message": self.message, "domain": "global", "reason": reason}
        error = {"code": self.status, "message": self.message, "errors": [detail]}
        return json.dumps({"error": error}).encode()


class ConnectionCut(Exception):  # noqa: N818 - an event on the wire, often wanted, not an error
    """The connection ends here: scripted by a fault, or because the client went away."""

    def __init__(self, why: str, *, reset: bool = False) -> None:
        """`reset` sends a TCP RST, which the client sees as "connection reset by peer"."""
        super().__init__(why)
        self.reset = reset
