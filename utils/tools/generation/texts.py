"""Texts of a trained model: prompts in, finished texts out, in the order of the prompts.

    prompts -> jobs -> batches of similar length -> tokens -> pieces of text -> texts

A text depends on its model, prompt and sampling (the seed in it); which other texts are made beside
it matters only by the rounding of batched products (`utils/models/generation.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from utils.base.errors import ResourceShortageError, UsageError
from utils.base.text import printable
from utils.models.generation import Batch, GrowingText, evaluating, require_known_ids
from utils.models.text_stream import StopFinder, TextStream
from utils.models.token_choice import Sampling
from utils.models.tokenizer import encode_prompt
from utils.tools.generation.loading import LoadedModel

STOP_TEXT = "stop_text"
WINDOW_BATCHES = 32
"""Prompts of so many batches are sorted by length together: texts come before all are done."""
MOST_SAMPLES = 100_000

OnPiece = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A text to be written.

    Attributes:
        prompt: What it begins with, not part of the text.
        ids: The prompt as token ids.
        sampling: How its tokens are chosen.
        sample: Its number among those of the same prompt, from 0.
    """

    prompt: str
    ids: Sequence[int]
    sampling: Sampling
    sample: int = 0


@dataclass(frozen=True)
class Text:
    """A text that is finished.

    Attributes:
        job: What it was made for.
        text: What follows the prompt, up to a stop text.
        token_ids: Its tokens, those of the stop text too, without the end token.
        finish: `end_token`, `max_tokens`, `stop_text` or `not_finite` (broken weights).
        first_token_seconds: From the begin of its batch to its first token.
        seconds: From the begin of its batch to its end.
    """

    job: Job
    text: str
    token_ids: list[int]
    finish: str
    first_token_seconds: float
    seconds: float


@dataclass
class Speed:
    """What texts took: the prompts (prefill), and the tokens after the first ones (decoding)."""

    texts: int = 0
    prompt_tokens: int = 0
    first_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that were made."""
        return self.first_tokens + self.decoded_tokens

    def describe(self) -> str:
        """Return a line for people."""
        several = self.texts > 1
        made, read = _count_of(self.tokens, "token"), _count_of(self.prompt_tokens, "token")
        if several:
            seconds = self.prefill_seconds + self.decode_seconds
            line = f"{made} in {_count_of(self.texts, 'text')}, {seconds:.2f}s; prompts: {read}"
        else:
            line = f"{made}; prompt: {read}, first token after {self.prefill_seconds:.3f}s"
        if several and self.prefill_seconds > 0:
            line += f", {self.prompt_tokens / self.prefill_seconds:,.0f} tokens/s"
        if self.decoded_tokens and self.decode_seconds > 0:
            line += f"; then {self.decoded_tokens / self.decode_seconds:,.1f} tokens/s"
        return line


class TextGenerator:
    """Writes texts with a loaded model.

    Args:
        loaded: The model and its tokenizer.
        stops: Texts that end a text; they are not part of it.
        ignore_end: Go on after the token that ends a text in the data.
        batch_size: Texts that grow together.

    Raises:
        UsageError: There is no tokenizer, or a value is out of its range.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        stops: Sequence[str] = (),
        ignore_end: bool = False,
        batch_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}.")
        if not all(stops):
            raise UsageError("A stop text must not be empty.")
        self._loaded, self._stops, self._batch_size = loaded, tuple(stops), batch_size
        self._tokenizer = loaded.require_tokenizer()
        self._end_ids = () if ignore_end else find_end_ids(loaded)
        self.speed = Speed()

    def plan(self, prompts: Sequence[str], sampling: Sampling, samples: int = 1) -> list[Job]:
        """Return the jobs of prompts: sample n of any prompt has the seed + n.

        Raises:
            UsageError: A prompt is one that the model or its tokenizer cannot read.
        """
        if not 1 <= samples <= MOST_SAMPLES:
            raise UsageError(f"num_samples must be 1 to {MOST_SAMPLES}, got {samples}.")
        if samples > 1 and sampling.is_greedy:
            raise UsageError("Several samples of a prompt need a temperature above 0.")
        seeds = [replace(sampling, seed=sampling.seed + number) for number in range(samples)]
        jobs = []
        for prompt in prompts:
            ids = self._encode(prompt)
            jobs += [Job(prompt, ids, own, number) for number, own in enumerate(seeds)]
        return jobs

    def write(self, jobs: Sequence[Job], on_piece: OnPiece | None = None) -> Iterator[Text]:
        """Yield the texts of jobs in their order.

        Args:
            jobs: As `plan` makes them.
            on_piece: Told each piece of a text as soon as it is there. For texts that come one
                after the other: the batch size is 1, or there is one job.

        Raises:
            ResourceShortageError: They do not fit into memory.
        """
        assert on_piece is None or self._batch_size == 1 or len(jobs) == 1
        size = self._batch_size * WINDOW_BATCHES
        for begin in range(0, len(jobs), size):
            window = jobs[begin : begin + size]
            done: dict[int, Text] = {}
            following = 0
            for numbers in _batches(window, self._batch_size):
                texts = self._write_together([window[n] for n in numbers], on_piece)
                done.update(zip(numbers, texts, strict=True))
                while following in done:
                    yield done.pop(following)
                    following += 1

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")  # bytes of a command line that are none
            ids = encode_prompt(self._tokenizer, prompt)
            require_known_ids(ids, self._loaded.vocab_size)
        except UnicodeEncodeError as exc:
            raise UsageError(f"The prompt {printable(prompt, 60)!r} is no UTF-8.") from exc
        except UsageError as exc:
            raise UsageError(f"The prompt {printable(prompt, 60)!r}: {exc}") from exc
        return ids

    def _write_together(self, jobs: Sequence[Job], on_piece: OnPiece | None) -> list[Text]:
        growing = [_Growing(job, self._tokenizer, self._stops) for job in jobs]
        with (
            _memory_errors_explained(jobs, self._loaded),
            evaluating(self._loaded.model),
            torch.inference_mode(),  # a tenth quicker where the model is small
        ):
            self._grow(growing, on_piece or (lambda piece: None))
        return [one.result() for one in growing]

    def _grow(self, growing: Sequence[_Growing], on_piece: OnPiece) -> None:
        begin = time.perf_counter()
        first = 0.0
        owners = {id(one.row): one for one in growing}
        batch = Batch(self._loaded.model, [one.row for one in growing], self._end_ids)
        try:
            while batch.is_growing:
                for row in batch.step():
                    on_piece(owners[id(row)].read())
                now = time.perf_counter() - begin
                first = first or now
                for one in growing:
                    if one.row.finish and not one.is_closed:
                        on_piece(one.close(first, now))
        finally:
            self._count(growing, first, time.perf_counter() - begin)

    def _count(self, growing: Sequence[_Growing], first: float, seconds: float) -> None:
        speed, made = self.speed, [len(one.row.tokens) for one in growing]
        speed.texts += len(growing)
        speed.prompt_tokens += sum(len(one.row.prompt) for one in growing)
        speed.first_tokens += sum(map(bool, made))
        speed.prefill_seconds += first
        speed.decoded_tokens += sum(max(0, tokens - 1) for tokens in made)
        speed.decode_seconds += seconds - first


class _Growing:
    """A text on its way."""

    def __init__(self, job: Job, tokenizer: Any, stops: Sequence[str]) -> None:
        self.row = GrowingText(job.ids, job.sampling)
        self.is_closed = False
        self._job = job
        # Before the begin of a text stands a token, but no text.
        self._stream = TextStream(tokenizer, job.ids if job.prompt else ())
        self._finder = StopFinder(stops)
        self._pieces: list[str] = []
        self._seconds = (0.0, 0.0)

    def read(self) -> str:
        """Return what the newest token adds to the text; end the row at a stop text."""
        return self._take(self._finder.push(self._stream.push(self.row.tokens[-1])))

    def close(self, first: float, seconds: float) -> str:
        """Return what was held back; no more tokens come."""
        self.is_closed, self._seconds = True, (first, seconds)
        last = "" if self._finder.found is not None else self._finder.push(self._stream.close())
        return self._take(last + self._finder.close())

    def result(self) -> Text:
        """Return the finished text."""
        text = "".join(self._pieces)
        return Text(self._job, text, self.row.tokens, self.row.finish, *self._seconds)

    def _take(self, piece: str) -> str:
        if self._finder.found is not None:
            self.row.finish = STOP_TEXT
        self._pieces.append(piece)
        return piece


def find_end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return the tokens that end a text, as `model.generate` and the tokenizer know them."""
    settings = getattr(loaded.model, "generation_config", None)
    known = getattr(settings, "eos_token_id", None)
    found = known if isinstance(known, (list, tuple)) else [known]
    own = getattr(loaded.tokenizer, "eos_token_id", None)
    return tuple(sorted({token for token in (*found, own) if token is not None}))


def _count_of(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _batches(jobs: Sequence[Job], size: int) -> Iterator[list[int]]:
    """Yield the numbers of jobs that grow together: of similar length, the longest first.

    What does not fit into memory then fails at the begin and not after an hour.
    """
    numbers = list(range(len(jobs)))
    if size > 1:
        numbers.sort(key=lambda number: -len(jobs[number].ids))
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


@contextlib.contextmanager
def _memory_errors_explained(jobs: Sequence[Job], loaded: LoadedModel) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        is_host = isinstance(exc, MemoryError) or "can't allocate memory" in str(exc)
        if not is_host and not isinstance(exc, torch.OutOfMemoryError):
            raise
        longest = max(len(job.ids) for job in jobs)
        if len(jobs) > 1:
            advice = f"--batch-size {len(jobs) // 2}"
        else:
            advice = "a shorter prompt, --dtype bfloat16, or --device cpu"
        raise ResourceShortageError(
            f"{len(jobs)} text(s) at once, with prompts of up to {longest} tokens, do not fit into "
            f"the memory of {loaded.device}. Try {advice}."
        ) from exc
