"""Texts of a trained model: prompts in, finished texts out, in the order of the prompts.

    prompts -> jobs -> batches of similar length -> tokens -> pieces of text -> texts

A greedy text depends on its model and prompt (and on the rounding of batched products); a sampled
one also on the texts that are made beside it, which share its random numbers.
"""

from __future__ import annotations

import contextlib
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import TextStreamer

from utils.base.errors import ResourceShortageError, UsageError
from utils.base.text import count_of, printable
from utils.models.generation import (
    NotFiniteError,
    Sampling,
    StopWhen,
    generate_tokens,
    require_known_ids,
)
from utils.models.tokenizer import encode_prompt
from utils.remote.loading import LoadedModel

END_TOKEN, MAX_TOKENS, STOP_TEXT, NOT_FINITE = "end_token", "max_tokens", "stop_text", "not_finite"
WINDOW_BATCHES = 32
"""Prompts of so many batches are sorted by length together: texts come before all are done."""
MOST_SAMPLES = 100_000

OnPiece = Callable[[str], None]


@dataclass(frozen=True)
class TextJob:
    """A text to be written; `ids` are those of the prompt, which is no part of it.

    `sample` is its number among those of the same prompt, from 0.
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
        seconds: From the begin of its batch to the end of the batch.
    """

    job: TextJob
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
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def describe(self) -> str:
        """Return a line for people."""
        made, read = count_of(self.tokens, "token"), count_of(self.prompt_tokens, "token")
        line = f"{made} in {count_of(self.texts, 'text')}; "
        line += f"prompts: {read}, first token after {self.prefill_seconds:.3f}s"
        decoded = self.tokens - self.texts
        if decoded > 0 and self.decode_seconds > 0:
            line += f"; then {decoded / self.decode_seconds:,.1f} tokens/s"
        return line


class StopFinder:
    """Ends a text before the first of several texts in it.

    The text that is complete first counts (of those that end together the longest), so the result
    is the same whatever pieces the text comes in. None of the texts is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Return what may be shown; nothing more once `found` is set."""
        if self.found is not None:
            return ""
        text = self._held + piece
        ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops]
        complete = min((end for end in ends if end[1] >= 0), default=None)
        if complete is not None:
            self.found = complete[2]
        begin = len(text) - self._open_end(text) if complete is None else complete[1]
        shown, self._held = text[:begin], text[begin:]
        return shown

    def close(self) -> str:
        """Return what was held back, because a stop text might have begun with it."""
        return "" if self.found is not None else self._held

    def _open_end(self, text: str) -> int:
        """Return the length of the longest end of the text that a stop text begins with."""
        lengths = range(max(map(len, self._stops), default=1) - 1, 0, -1)
        return next((n for n in lengths if any(stop[:n] == text[-n:] for stop in self._stops)), 0)


class _Pieces(TextStreamer):
    """Tells each piece of a text as soon as its words are whole, up to a stop text.

    The prompt is decoded along: some tokenizers drop the space at the begin of what they decode.
    """

    def __init__(self, generator: TextGenerator, prompt: Sequence[int], on_piece: OnPiece) -> None:
        super().__init__(generator.tokenizer, clean_up_tokenization_spaces=False)
        self._end_ids, self._on_piece = generator.end_ids, on_piece
        self._hidden = len(generator.decode(prompt))
        self._finder = StopFinder(generator.stops)

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token; a token that ends the text is no part of it."""
        if value.dim() == 1 and value.tolist()[0] in self._end_ids:
            return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on what follows the prompt."""
        hidden = min(self._hidden, len(text))
        self._hidden -= hidden
        self._on_piece(self._finder.push(text[hidden:]))
        if stream_end:
            self._on_piece(self._finder.close())


class TextGenerator:
    """Writes texts with a loaded model, `batch_size` together.

    Each of `stops` ends a text and is no part of it; with `ignore_end` the end token does not.

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
        self._loaded, self._batch_size = loaded, batch_size
        self.tokenizer, self.stops = loaded.require_tokenizer(), tuple(stops)
        self.end_ids = () if ignore_end else find_end_ids(loaded)
        self.speed = Speed()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens as it is, special ones and spaces too."""
        text: str = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return text

    def plan(self, prompts: Sequence[str], sampling: Sampling, samples: int = 1) -> list[TextJob]:
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
            jobs += [TextJob(prompt, ids, own, number) for number, own in enumerate(seeds)]
        return jobs

    def write(self, jobs: Sequence[TextJob], on_piece: OnPiece | None = None) -> Iterator[Text]:
        """Yield the texts of the jobs of `plan` in their order.

        `on_piece` is told each piece of a text as soon as it is there, for texts that come one
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
            ids = encode_prompt(self.tokenizer, prompt)
            require_known_ids(ids, self._loaded.vocab_size)
        except UnicodeEncodeError as exc:
            raise UsageError(f"The prompt {printable(prompt, 60)!r} is no UTF-8.") from exc
        except UsageError as exc:
            raise UsageError(f"The prompt {printable(prompt, 60)!r}: {exc}") from exc
        return ids

    def _write_together(self, jobs: Sequence[TextJob], on_piece: OnPiece | None) -> list[Text]:
        longest = max(len(job.ids) for job in jobs)
        begin, times = time.perf_counter(), []

        def is_over(ids: torch.Tensor) -> Sequence[bool] | bool:
            times.append(time.perf_counter() - begin)
            return (
                [self._has_stop(row) for row in ids[:, longest:].tolist()] if self.stops else False
            )

        try:
            with _memory_errors_explained(jobs, self._loaded):
                found: Sequence[list[int] | None] = generate_tokens(
                    self._loaded.model,
                    [job.ids for job in jobs],
                    jobs[0].sampling,
                    end_ids=self.end_ids,
                    stop_when=[StopWhen(is_over)],
                    streamer=None if on_piece is None else _Pieces(self, jobs[0].ids, on_piece),
                )
        except NotFiniteError:
            found = [None] * len(jobs)
        seconds = time.perf_counter() - begin
        first = times[0] if times else seconds
        texts = [
            self._finish(job, tokens, len(times), first, seconds)
            for job, tokens in zip(jobs, found, strict=True)
        ]
        self._count(texts, first, seconds)
        return texts

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(stop in text for stop in self.stops)

    def _finish(
        self, job: TextJob, tokens: list[int] | None, steps: int, first: float, seconds: float
    ) -> Text:
        """Return the text of tokens, None where the weights are broken; `steps`: of the batch."""
        if tokens is None:
            return Text(job, "", [], NOT_FINITE, first, seconds)
        before = self.decode(job.ids)
        finder = StopFinder(self.stops)
        text = finder.push(self.decode([*job.ids, *tokens])[len(before) :]) + finder.close()
        finish = MAX_TOKENS if len(tokens) == steps else END_TOKEN
        if finder.found is not None:
            prefixes = [tokens[:count] for count in range(len(tokens) + 1)]
            tokens, finish = prefixes[bisect_left(prefixes, True, key=self._has_stop)], STOP_TEXT
        return Text(job, text, tokens, finish, first, seconds)

    def _count(self, texts: Sequence[Text], first: float, seconds: float) -> None:
        speed = self.speed
        speed.texts += len(texts)
        speed.prompt_tokens += sum(len(text.job.ids) for text in texts)
        speed.tokens += sum(len(text.token_ids) for text in texts)
        speed.prefill_seconds += first
        speed.decode_seconds += seconds - first


def find_end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return the tokens that end a text, as `model.generate` and the tokenizer know them."""
    settings = getattr(loaded.model, "generation_config", None)
    known = getattr(settings, "eos_token_id", None)
    found = known if isinstance(known, (list, tuple)) else [known]
    own = getattr(loaded.tokenizer, "eos_token_id", None)
    return tuple(sorted({token for token in (*found, own) if token is not None}))


def _batches(jobs: Sequence[TextJob], size: int) -> Iterator[list[int]]:
    """Yield the numbers of jobs that grow together: of similar length, the longest first.

    What does not fit into memory then fails at the begin and not after an hour.
    """
    numbers = list(range(len(jobs)))
    if size > 1:
        numbers.sort(key=lambda number: -len(jobs[number].ids))
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


@contextlib.contextmanager
def _memory_errors_explained(jobs: Sequence[TextJob], loaded: LoadedModel) -> Iterator[None]:
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
