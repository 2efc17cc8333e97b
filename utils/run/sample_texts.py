"""The texts that a run writes at each evaluation, so that people see what the model has learned.

    prompts, tokenizer of the data -> generation -> samples.jsonl, TensorBoard, W&B

Training is left as it is (see `utils/models/generation.py`). An error here is logged once and ends
the sample texts, never the run. The main process alone writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.training_config import TrainingConfig
from utils.base.console import without_control_characters
from utils.base.text import printable
from utils.models.generation import Sampling, StopWhen, generate_tokens
from utils.models.tokenizer import begin_like_data, encode_prompt, load_tokenizer
from utils.tracking.metrics_log import append_metrics
from utils.training_utils import TrainState

TEMPERATURE = 0.8
TOP_P = 0.95

log = logging.getLogger("train")


@dataclass(frozen=True)
class Sample:
    """A text of the model.

    No character of the text, which is without the prompt, can steer a terminal.
    """

    prompt: str
    text: str


class Sampler:
    """Writes a text for each prompt of a configuration.

    `tokenizer_files` are the data's, file name -> bytes; empty where they have none.
    """

    def __init__(
        self, config: TrainingConfig, tokenizer_files: Mapping[str, bytes], path: Path
    ) -> None:
        self._prompts = config.sample_prompts if config.sample_tokens else []
        self._sampling = Sampling(config.sample_tokens, TEMPERATURE, top_p=TOP_P, seed=config.seed)
        self._files, self._path = tokenizer_files, path
        self._tokenizer: Any = None

    def write(self, state: TrainState, should_stop: Callable[[], bool]) -> list[Sample]:
        """Return the texts of the model as it is, and append them to `samples.jsonl`.

        The state is left as it is, bit for bit. `should_stop` is asked before each token; once it
        says so, there are no texts.
        """
        if not self._prompts:
            return []
        try:
            samples = self._sample(state, should_stop)
        except Exception as exc:  # noqa: BLE001 - tokenizers raises bare Exception; memory is short
            log.debug("Sampling failed.", exc_info=True)
            self._give_up(printable(exc) or type(exc).__name__, logging.WARNING)
            return []
        step = state.progress.step
        for number, sample in enumerate(samples):
            level = logging.DEBUG if number else logging.INFO
            log.log(
                level,
                "Sample at step %d: %s -> %s",
                step,
                printable(repr(sample.prompt)),
                printable(repr(sample.text)),
            )
        try:
            for sample in samples:
                append_metrics(self._path, {"step": step, **asdict(sample)})
        except OSError as exc:
            log.warning("%s cannot be written: %s.", self._path, exc.strerror or exc)
        return samples

    def _sample(self, state: TrainState, should_stop: Callable[[], bool]) -> list[Sample]:
        if not state.division.has_whole_weights:  # a forward of one rank would wait for the others
            self._give_up("each rank holds a part of the weights only")
            return []
        if self._tokenizer is None and not self._files:
            self._give_up("the data come without a tokenizer")
            return []
        if self._tokenizer is None:
            config: Any = state.core_model.config
            self._tokenizer = begin_like_data(load_tokenizer(self._files), config.bos_token_id)
        samples = []
        for prompt in self._prompts:
            end = self._tokenizer.eos_token_id
            ids = encode_prompt(self._tokenizer, prompt)
            with state.accelerator.autocast():
                (tokens,) = generate_tokens(
                    state.core_model,
                    [ids],
                    self._sampling,
                    end_ids=() if end is None else (end,),
                    stop_when=[StopWhen(lambda ids: should_stop())],
                )
            if should_stop():
                return []
            text = self._tokenizer.decode(tokens).expandtabs(4)
            samples.append(Sample(prompt, without_control_characters(text)))
        return samples

    def _give_up(self, reason: str, level: int = logging.INFO) -> None:
        log.log(level, "No sample texts in this attempt: %s.", reason.rstrip("."))
        self._prompts = []
