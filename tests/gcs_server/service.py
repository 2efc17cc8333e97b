"""From a request to its answer: route, permission, faults, operation, record.

Two steps, because the faults of a request must be known before its body is read:
`begin` finds out what is asked for, `answer` does it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ApiError, ConnectionCut
from .faults import FaultPlan, Gate, RequestFaults
from .messages import Call, Request, Response, State
from .routes import Route, find_route
from .uploads import drop_session, peek_name


@dataclass
class RequestRecord:
    """One request; filled in while it is served, complete when `finished` is set."""

    operation: str
    """The server's name for what was asked: upload.start, object.get, ...; see `routes`."""
    name: str
    headers: dict[str, str]
    status: int | None = None
    """None while none was sent, which stays so when the connection was cut before."""
    response_bytes: int = 0
    """Body bytes sent."""
    finished: bool = False


@dataclass
class Exchange:
    """A request that is being served."""

    call: Call
    route: Route | None
    """None when there is no such operation."""
    faults: RequestFaults
    record: RequestRecord


class Service:
    """The fake service, without any connection."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.faults = FaultPlan()
        self.records: list[RequestRecord] = []
        """All requests in the order of their arrival."""
        self.failures: list[BaseException] = []
        """Errors of the service's own making, which should fail the test."""

    def begin(self, request: Request) -> Exchange:
        """Find out what is asked for, and which faults may hit it.

        Raises:
            ConnectionCut: The client went away before it had said what it wants.
        """
        route, names = find_route(request) or (None, {})
        operation = route.operation if route else "unknown"
        name = names.get("name") or request.query.get("name", "")
        if not name and operation in ("upload.multipart", "upload.start"):
            name = peek_name(request)
        faults = self.faults.begin(operation, name)
        record = RequestRecord(operation, name, dict(request.headers.items()))
        self.records.append(record)
        if request.body.length:
            request.body.gate = Gate(faults)
        bucket, source_name = names.get("bucket", ""), names.get("source_name", "")
        call = Call(self.state, request, bucket, name, source_name)
        return Exchange(call, route, faults, record)

    def answer(self, exchange: Exchange) -> Response:
        """Do what is asked.

        Raises:
            ConnectionCut: No answer is to be given.
        """
        response = self._operate(exchange)
        exchange.call.request.body.drain()
        if response.committed and exchange.faults.claim("lost_answer"):
            response.close()
            raise ConnectionCut("the answer is lost")
        return response

    def _operate(self, exchange: Exchange) -> Response:
        request, route = exchange.call.request, exchange.route
        try:
            if fault := exchange.faults.claim("status"):
                raise ApiError(fault.status, f"Scripted answer {fault.status}.")
            if fault := exchange.faults.claim("lost_session"):
                drop_session(self.state, request)
                raise ApiError(fault.status, f"Scripted answer {fault.status}.")
            if route is None:  # clients do not retry a 400
                raise ApiError(400, f"This server does not know {request.method} {request.path}.")
            self._require_permission(exchange.call, route)
            return route.call(exchange.call)
        except ApiError as error:
            headers = {"Content-Type": "application/json; charset=UTF-8"}
            return Response(error.status, headers, error.json_body())

    def _require_permission(self, call: Call, route: Route) -> None:
        request, bucket = call.request, self.state.store.bucket(call.bucket)
        payer = request.query.get("userProject", request.headers.get("x-goog-user-project"))
        if payer is not None and not payer.strip():
            raise ApiError(400, "User project specified in the request is invalid.")
        # The address of a session stands for what its first request said.
        is_session = "upload_id" in request.query
        if bucket.requester_pays and not payer and not is_session:
            raise ApiError(400, "Bucket is a requester pays bucket but no user project provided.")
        bucket.require(route.permission)
