import sys
from types import TracebackType


def _end_quietly(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """Leave out the traceback where it is no bug: a library that is not installed, or a Ctrl-C.

    Both while libraries load; later, errors become messages elsewhere. Python still ends as by
    SIGINT.
    """
    if isinstance(error, ModuleNotFoundError):
        print(
            f"Error: {error}. Is the environment active? source venv/bin/activate (bash setup.sh "
            "makes it).",
            file=sys.stderr,
        )
    elif not isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, at)


if sys.excepthook is sys.__excepthook__:
    sys.excepthook = _end_quietly
