"""From a request to its answer: route, permission, faults, operation, record.

Two steps, because the faults of a request must be known before its body is read:
`begin` finds out what is asked for, `answer` does it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ApiError, ConnectionCut
from .faults import Fault, FaultPlan, Gate, RequestFaults
from .messages import Request, Response
from .request_log import RequestLog, RequestRecord
from .routes import Match, find_route
from .state import Call, State
from .uploads import drop_session, peek_name


@dataclass
class Exchange:
    """A request that is being served."""

    request: Request
    match: Match | None
    """None when there is no such operation."""
    faults: RequestFaults
    record: RequestRecord
    refusal: ApiError | None = None
    """Why it cannot be served, when that was found while beginning."""


class Service:
    """The fake service, without any connection."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.faults = FaultPlan()
        self.log = RequestLog()
        self.failures: list[BaseException] = []
        """Errors of the service's own making, which should fail the test."""

    def begin(self, request: Request) -> Exchange:
        """Find out what is asked for, and which faults may hit it.

        Raises:
            ConnectionCut: The client went away before it had said what it wants.
        """
        match, refusal, name = None, None, ""
        try:
            match = find_route(request)
            name = match.name or request.query.get("name", "")
            if not name and match.route.operation in ("upload.multipart", "upload.start"):
                name = peek_name(request)
        except ApiError as error:
            refusal = error
        operation = match.route.operation if match else "unknown"
        faults = self.faults.begin(operation, name)
        record = RequestRecord(operation, name, dict(request.headers.items()))
        record.faults = faults.fired
        record.request_bytes = request.body.bytes_ahead
        request.body.record = record
        self.log.add(record)
        if request.body.length:
            request.body.gate = Gate(faults)
        return Exchange(request, match, faults, record, refusal)

    def answer(self, exchange: Exchange) -> Response:
        """Do what is asked.

        Raises:
            ConnectionCut: No answer is to be given.
        """
        response = self._operate(exchange)
        exchange.request.body.drain()
        if response.committed and exchange.faults.claim("lost_answer"):
            response.close()
            raise ConnectionCut("the answer is lost")
        return response

    def _operate(self, exchange: Exchange) -> Response:
        fault = exchange.faults.claim("status")
        if fault is not None:
            return _scripted_response(fault)
        fault = exchange.faults.claim("lost_session")
        if fault is not None:
            drop_session(self.state, exchange.request)
            return _scripted_response(fault)
        try:
            if exchange.match is None or exchange.refusal is not None:
                raise exchange.refusal or ApiError(400, "no route")
            return self._call(exchange.match, exchange)
        except ApiError as error:
            return error_response(error)

    def _call(self, match: Match, exchange: Exchange) -> Response:
        request = exchange.request
        bucket = self.state.store.bucket(match.bucket)
        payer = request.query.get("userProject") or request.headers.get("x-goog-user-project")
        # The address of a session stands for what its first request said.
        is_session = "upload_id" in request.query
        if bucket.requester_pays and not payer and not is_session:
            raise ApiError(400, "Bucket is a requester pays bucket but no user project provided.")
        bucket.require(match.route.permission)
        if match.route.operation.startswith("upload.") and not exchange.record.name:
            raise ApiError(400, "Required parameter: name")
        call = Call(self.state, request, match.bucket, exchange.record.name, match.source_name)
        return match.route.call(call)


def error_response(error: ApiError) -> Response:
    """The answer to a request that fails."""
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    return Response(error.status, headers, error.json_body())


def _scripted_response(fault: Fault) -> Response:
    return error_response(ApiError(fault.status, f"Scripted answer {fault.status}."))
