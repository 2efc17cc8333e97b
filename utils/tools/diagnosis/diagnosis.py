"""How a diagnosis goes on whatever breaks: questions that may fail, parts in a process apart.

    a question -> its answer or None;  a part that can hang or crash -> what it told until then

A broken driver raises anything, hangs in a system call, or takes the process with it; a broken
torch dies of an illegal instruction. None of that may hide the other facts. No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from utils.base.child_process import live_no_longer_than
from utils.base.errors import first_line

PROBLEM, NOTE, OK = "problem", "note", "ok"
END_SECONDS = 5.0

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """Something worth saying.

    Attributes:
        level: ok, note, or problem.
        message: What is the case.
        advice: What to do about it, empty where there is nothing to do.
    """

    level: str
    message: str
    advice: str = ""


@dataclass(frozen=True)
class Broken:
    """The last thing of a part that could not tell everything.

    Attributes:
        reason: Half a sentence: "it ended by SIGILL", "no answer within 60 s".
    """

    reason: str


def ask(question: Callable[..., T], *args: object) -> T | None:
    """Return the answer to a question, None where there is none.

    A lambda holds back the lookup of the name too, where a version may lack it.
    """
    try:
        return question(*args)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the next question is asked
        log.debug("No answer: %s: %s", type(exc).__name__, exc)
        return None


def run_apart(
    part: Callable[..., Iterator[Any]], *args: object, limit_seconds: float
) -> Iterator[Any]:
    """Yield what a generator yields in a process of its own; at most one `Broken` ends it.

    Args:
        part: A function of a module; its arguments and what it yields are pickled.
        args: Its arguments.
        limit_seconds: How long each next value may take.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_tell, args=(theirs, os.getpid(), part, args), daemon=True)
    child.start()
    theirs.close()
    try:
        yield from _listen(ours, child, limit_seconds)
    finally:
        ours.close()
        if child.is_alive():
            child.kill()
        # One that hangs in the kernel does not end; it is a daemon and nobody waits for it.
        child.join(END_SECONDS)


def _listen(pipe: Connection, child: Any, limit_seconds: float) -> Iterator[Any]:
    while True:
        try:
            if not pipe.poll(limit_seconds):
                yield Broken(f"no answer within {limit_seconds:.0f} s")
                return
            is_last, value = pipe.recv()
        except (EOFError, OSError):
            child.join(END_SECONDS)
            yield Broken(_describe_end(child.exitcode))
            return
        except Exception as exc:  # noqa: BLE001 - what was sent cannot be read here
            yield Broken(first_line(exc))
            return
        if not is_last:
            yield value
        elif value is not None:
            yield Broken(value)
            return
        else:
            return


def _describe_end(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"it ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"


def _tell(pipe: Connection, parent: int, part: Callable[..., Iterator[Any]], args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    if os.name == "posix":
        live_no_longer_than(parent)
    problem = None
    try:
        for value in part(*args):
            pipe.send((False, value))
    except Exception as exc:  # noqa: BLE001 - the reason goes to the parent
        problem = f"{type(exc).__name__}: {first_line(exc)}"
    pipe.send((True, problem))
