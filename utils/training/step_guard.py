"""The step guard: loss and gradients are judged before the optimizer may use them.

A step is bad when its loss or the norm of its gradients is not finite, or when its loss is a spike:
beyond `sigma` standard deviations above the mean of the last `window` good steps. The verdict is
made on the device. On a GPU the optimizer obeys it there (`found_inf` of fused AdamW), and the host
reads it one step later, so that judging costs no wait. For other optimizers the host waits for it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch

GOOD, NON_FINITE, SPIKE = 0, 1, 2
KINDS = {NON_FINITE: "non-finite", SPIKE: "spike"}


@dataclass(frozen=True)
class Verdict:
    """What was found of one step.

    Steps count from 1. `loss` is the mean over all ranks, before the update; `grad_norm` is that
    before clipping.
    """

    step: int
    code: int
    loss: float
    grad_norm: float

    @property
    def kind(self) -> str:
        """non-finite or spike."""
        return KINDS[self.code]


class StepGuard:
    """Judges each step; every rank has the same inputs and so the same verdicts.

    A loss `sigma` standard deviations above the mean of the last `window` good steps is a spike,
    once there are so many; with None none is. A loss scaler looks for overflow itself: then
    gradients are not checked. With `is_on_device` the optimizer obeys the verdict on the device,
    and the host reads it one step later.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        sigma: float | None,
        window: int,
        should_check_gradients: bool = True,
        is_on_device: bool = False,
    ) -> None:
        self.is_on_device = is_on_device
        self.losses = torch.full((window if sigma else 0,), math.nan, device=device)
        """Losses of the last good steps, oldest first, NaN where there was none yet."""
        self._sigma, self._should_check_gradients = sigma, should_check_gradients
        self._unread: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def judge(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Return the verdict's code: float32, shape [], on the device.

        `step` counts from 1; `loss` is the mean over all ranks, float32, shape []; `grad_norm` has
        shape [].
        """
        finite = torch.isfinite(loss)
        if self._should_check_gradients:
            finite = finite & torch.isfinite(grad_norm)
        code = torch.where(finite, float(GOOD), float(NON_FINITE))
        if self._sigma is not None:
            limit = self.losses.mean() + self._sigma * self.losses.std()
            code = torch.where(finite & (loss > limit), float(SPIKE), code)
            longer = torch.cat([self.losses[1:], loss.reshape(1)])
            self.losses = torch.where(code == GOOD, longer, self.losses)
        record = torch.stack([code, loss, grad_norm.float().to(loss.device)])
        event = None
        if self.is_on_device and record.device.type == "cuda":
            host = torch.empty(3, pin_memory=True)
            host.copy_(record, non_blocking=True)
            event = torch.cuda.current_stream(record.device).record_event()
            record = host
        self._unread.append((step, record, event))
        return code

    def take(self, *, newest: bool) -> list[Verdict]:
        """Return the verdicts that were not returned yet.

        With `newest` also that of the last step, for which the device is waited for.
        """
        found = []
        while len(self._unread) > (1 if self.is_on_device and not newest else 0):
            step, record, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            code, loss, grad_norm = record.tolist()
            found.append(Verdict(step, int(code), loss, grad_norm))
        return found

    def forget(self) -> None:
        """Drop the verdicts that were not returned yet."""
        self._unread.clear()

    def restore(self, losses: list[float | None]) -> None:
        """Bring back the window of a checkpoint; what does not fit is left out, oldest first."""
        kept = [loss for loss in losses if loss is not None][-len(self.losses) :]
        self.losses.fill_(math.nan)
        if kept and len(self.losses):
            self.losses[-len(kept) :] = torch.tensor(kept)
