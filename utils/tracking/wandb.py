"""Curves and texts of a run in Weights & Biases, through Accelerate's own tracker.

    metrics, texts of a run -> wandb -> its service, or a folder in the logs that `wandb sync` sends

It never asks a question: a machine without a login, or one that cannot reach the service, keeps the
run offline and says so. A run that is resumed goes on under its id.
"""

from __future__ import annotations

import importlib
import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils.base.text import printable
from utils.tracking.tracker import RunStart, RunTracker, group_metrics

PROJECT = "neox-pretrain"
INIT_SECONDS = 30.0
FINISH_SECONDS = 15.0  # a stop has a grace period; what is left is for `wandb sync`
EVENT_COLUMNS = ["event"]
SAMPLE_COLUMNS = ["step", "prompt", "text"]

log = logging.getLogger("train")


class WandbTracker(RunTracker):
    """Writes one attempt of a run to W&B; wandb keeps its own files in a folder of the logs."""

    name = "wandb"
    title = "W&B"

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._logs = logs
        self._inner: Any = None
        self._highest = 0

    @property
    def tracker(self) -> Any:
        """The wandb run, None before there is one."""
        return None if self._inner is None else self._inner.tracker

    def _begin(self, start: RunStart) -> None:
        mode = find_mode()
        try:
            self._inner = self._init(start, mode)
        except Exception as exc:
            if mode is not None:
                raise
            reason = printable(exc) or type(exc).__name__
            log.warning("W&B cannot be reached (%s): this attempt is kept offline.", reason)
            _import_wandb().teardown()  # else its service still holds the id of this run
            self._inner = self._init(start, "offline")
        run = self._inner.tracker
        self._inner.store_init_configuration({**start.config.to_json(), "start": dict(start.facts)})
        self._highest = int(run.step or 0)
        if run.offline:
            folder = Path(run.dir).parent
            log.info("W&B is offline. To send this attempt later: wandb sync %s", folder)
        elif run.url:
            log.info("W&B: %s", printable(run.url))

    def _init(self, start: RunStart, mode: str | None) -> Any:
        """Return Accelerate's tracker with a run that has begun."""
        from accelerate.tracking import WandBTracker

        wandb = _import_wandb()
        settings = wandb.Settings(
            silent=True,
            console="off",  # wandb would put itself between us and the terminal
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        self._logs.mkdir(parents=True, exist_ok=True)
        inner = WandBTracker(
            os.environ.get("WANDB_PROJECT") or PROJECT,
            name=start.config.run_name or start.curve,
            id=start.curve,
            group=start.identity.run_id,
            resume="allow",
            dir=str(self._logs),
            mode=mode,
            settings=settings,
        )
        inner.start()
        return inner

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._is_new(step):
            self._inner.log(group_metrics(values), step=step)

    def _log_lines(self, title: str, lines: Sequence[str], step: int) -> None:
        # Steps of W&B only grow: a late event goes to the newest step.
        if self._is_new(max(step, self._highest)):
            rows = [[line] for line in lines]
            self._inner.log_table(title, EVENT_COLUMNS, rows, step=self._highest)

    def _log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        if self._is_new(step):
            rows = [[step, prompt, text] for prompt, text in samples]
            self._inner.log_table("samples", SAMPLE_COLUMNS, rows, step=step)

    def _is_new(self, step: int) -> bool:
        """Tell whether W&B takes this step: it refuses steps below those it has."""
        if self._inner is None or step < self._highest:
            return False
        self._highest = step
        return True

    def _end(self, outcome: str) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.tracker.finish(exit_code=1 if outcome == "failed" else 0)


def find_mode() -> str | None:
    """Return "offline" where there is no login, None where wandb may choose its mode itself.

    Without a login, wandb would ask for a key in the terminal.
    """
    settings = _import_wandb().setup().settings
    if settings.mode not in ("online", "shared"):
        return None
    if settings.api_key or _has_login(settings.base_url):
        return None
    log.info("No login for W&B was found (wandb login, or WANDB_API_KEY).")
    return "offline"


def _import_wandb() -> Any:
    # Its own telemetry reports to its makers, also from a run that is offline.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return importlib.import_module("wandb")


def _has_login(base_url: str) -> bool:
    """Tell whether there is a key for W&B's service where wandb looks for one."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        try:
            found = netrc.netrc(Path(file).expanduser()).authenticators(urlsplit(base_url).netloc)
        except (OSError, netrc.NetrcParseError):
            continue
        if found:
            return True
    return False
