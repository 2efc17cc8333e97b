import sys
from types import TracebackType


def _end_quietly(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Leave out the traceback of a Ctrl-C while libraries load; Python still ends as by SIGINT."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, at)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end_quietly
