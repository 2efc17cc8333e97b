"""Texts of a loaded model: in the order of their prompts, each as it would be alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import GenerationConfig

from utils.base.errors import ResourceShortageError, UsageError
from utils.checkpoints.layout import read_manifest
from utils.models.generation import Sampling, generate_tokens
from utils.remote.loading import LoadedModel, ModelSource, load_model, load_named_tokenizer
from utils.tools.generation import texts as text_generation
from utils.tools.generation.texts import (
    MOST_SAMPLES,
    Speed,
    StopFinder,
    Text,
    TextGenerator,
    _Pieces,
    find_end_ids,
)

PROMPTS = ["The end", "", "a", "In the year of our", "x" * 30, "One more"]
SAMPLING = Sampling(8, 0.9, top_p=0.95, seed=5)
GREEDY = Sampling(8, temperature=0)


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> LoadedModel:
    path = max((trained_run / "checkpoints").glob("*step4-*"))
    loaded = load_model(ModelSource(path.name, str(path), read_manifest(path)), device="cpu")
    # After 4 steps many tokens are as good as equally likely: rounding, which each build of torch
    # does in its own way, must not decide between them.
    loaded.model.double()
    return loaded


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The lengths of the prompts of each batch that is made."""
    made: list[list[int]] = []

    def watched(model: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        made.append([len(prompt) for prompt in prompts])
        return generate_tokens(model, prompts, *arguments, **options)

    monkeypatch.setattr(text_generation, "generate_tokens", watched)
    return made


def write(
    loaded: LoadedModel, prompts: list[str], sampling: Sampling, **options: Any
) -> list[Text]:
    samples = options.pop("samples", 1)
    generator = TextGenerator(loaded, **options)
    return list(generator.write(generator.plan(prompts, sampling, samples)))


def test_a_greedy_text_is_the_same_alone_and_among_others(
    loaded: LoadedModel, batches: list[list[int]]
) -> None:
    together = write(loaded, PROMPTS, GREEDY, batch_size=4)
    assert [len(batch) for batch in batches] == [4, 2]
    lengths = [length for batch in batches for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [text.job.prompt for text in together] == PROMPTS
    for text in together:
        (alone,) = write(loaded, [text.job.prompt], GREEDY)
        assert (alone.text, alone.token_ids) == (text.text, text.token_ids)


def test_samples_of_a_prompt_are_texts_of_their_own(loaded: LoadedModel) -> None:
    texts = write(loaded, ["The", "a"], SAMPLING, samples=3, batch_size=4)
    places = [(text.job.prompt, text.job.sample) for text in texts]
    assert places == [(prompt, sample) for prompt in ("The", "a") for sample in range(3)]
    assert len({text.text for text in texts}) == 6
    assert texts == [
        replace(again, first_token_seconds=one.first_token_seconds, seconds=one.seconds)
        for one, again in zip(
            texts, write(loaded, ["The", "a"], SAMPLING, samples=3, batch_size=4), strict=True
        )
    ]


def test_texts_come_before_all_are_done(
    loaded: LoadedModel, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_generation, "WINDOW_BATCHES", 2)
    generator = TextGenerator(loaded, batch_size=2)
    texts = generator.write(generator.plan(["abcd", "abc", "ab", "a"] * 2, GREEDY))
    assert next(texts).job.prompt == "abcd"
    assert len(batches) == 1
    assert [text.job.prompt for text in texts] == ["abc", "ab", "a", "abcd", "abc", "ab", "a"]
    assert len(batches) == 4


def test_a_stop_text_ends_a_text_and_is_no_part_of_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: TextGenerator, tokens: Sequence[int]) -> str:
        return "".join(f"{token:03}" for token in tokens)  # whole characters of each token

    monkeypatch.setattr(TextGenerator, "decode", decode)
    tokens = write(loaded, ["x"], GREEDY, ignore_end=True)[0].token_ids
    whole = decode(TextGenerator(loaded), tokens)
    stop = whole[11:16]  # over the edges of three tokens
    (text,) = write(loaded, ["x"], GREEDY, ignore_end=True, stops=["not there", stop])
    count = (whole.index(stop) + len(stop) + 2) // 3
    assert (text.finish, text.text) == ("stop_text", whole[: whole.index(stop)])
    assert text.token_ids == tokens[:count]
    beside = write(loaded, ["The", "x"], GREEDY, ignore_end=True, stops=[stop], batch_size=2)
    assert beside[1].text == text.text


def test_pieces_make_the_text(loaded: LoadedModel) -> None:
    # Nobody knows what a model says that had 4 steps: a text of whole characters is looked for.
    samplings = (replace(SAMPLING, seed=seed) for seed in range(64))
    texts = (write(loaded, ["The"], sampling)[0] for sampling in samplings)
    whole = next(one for one in texts if one.text.isascii() and len(one.text) > 6)
    pieces: list[str] = []
    generator = TextGenerator(loaded, stops=[whole.text[4:6]])
    (text,) = generator.write(generator.plan(["The"], whole.job.sampling), pieces.append)
    assert "".join(pieces) == text.text == whole.text.split(whole.text[4:6])[0]


def test_an_end_token_ends_a_text_unless_it_is_to_be_ignored(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = write(loaded, ["The"], SAMPLING)
    number = next(
        n for n, t in enumerate(whole.token_ids) if n > 1 and t not in whole.token_ids[:n]
    )
    end = whole.token_ids[number]
    settings = GenerationConfig(eos_token_id=[end, 3])
    monkeypatch.setattr(loaded.model, "generation_config", settings)
    own = loaded.tokenizer.eos_token_id
    assert set(find_end_ids(loaded)) == {end, 3, own}
    pieces: list[str] = []
    generator = TextGenerator(loaded)
    (text,) = generator.write(generator.plan(["The"], SAMPLING), pieces.append)
    assert (text.finish, text.token_ids) == ("end_token", whole.token_ids[:number])
    assert "".join(pieces) == text.text
    (text,) = write(loaded, ["The"], SAMPLING, ignore_end=True)
    assert text.token_ids == whole.token_ids
    settings.eos_token_id = None
    assert find_end_ids(loaded) == (own,)


def test_no_tokens_and_broken_weights_are_told(loaded: LoadedModel) -> None:
    (text,) = write(loaded, ["The"], replace(SAMPLING, max_tokens=0))
    assert (text.text, text.finish) == ("", "max_tokens")
    path = Path(loaded.source.location)
    broken = load_model(ModelSource("broken", str(path), read_manifest(path)), device="cpu")
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    assert [text.finish for text in write(broken, ["The", "a"], SAMPLING, batch_size=2)] == [
        "not_finite"
    ] * 2


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_told_with_what_to_do(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(loaded.model, "generate", fail)
    with pytest.raises(ResourceShortageError, match=r"4 text\(s\) .*Try --batch-size 2"):
        write(loaded, PROMPTS, SAMPLING, batch_size=4)
    with pytest.raises(ResourceShortageError, match="--dtype bfloat16"):
        write(loaded, PROMPTS, SAMPLING)
    error = RuntimeError("a bug")  # any other is left as it is
    with pytest.raises(RuntimeError, match="a bug"):
        write(loaded, PROMPTS, SAMPLING)


def test_what_cannot_be_done_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="batch_size must be"):
        TextGenerator(loaded, batch_size=0)
    with pytest.raises(UsageError, match="stop text must not be empty"):
        TextGenerator(loaded, stops=["a", ""])
    with pytest.raises(UsageError, match="has no tokenizer"):
        TextGenerator(LoadedModel(loaded.source, loaded.model, None))
    generator = TextGenerator(loaded)
    for samples in (0, MOST_SAMPLES + 1):
        with pytest.raises(UsageError, match="num_samples must be"):
            generator.plan(["a"], SAMPLING, samples)
    with pytest.raises(UsageError, match="temperature above 0"):
        generator.plan(["a"], GREEDY, 2)
    with pytest.raises(UsageError, match="is no UTF-8"):
        generator.plan(["a", "\udcff"], SAMPLING)
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(["<far>"])  # the model has no such id
    generator = TextGenerator(LoadedModel(loaded.source, loaded.model, tokenizer))
    with pytest.raises(UsageError, match="'a <far>'.*vocabulary of 512"):
        generator.plan(["a", "a <far>"], SAMPLING)


def test_the_speed_is_told_for_prompts_and_tokens_apart(loaded: LoadedModel) -> None:
    generator = TextGenerator(loaded, batch_size=2)
    list(generator.write(generator.plan(["The end", "a", "b"], replace(SAMPLING, max_tokens=4))))
    speed = generator.speed
    assert (speed.texts, speed.tokens) == (3, 12)
    assert speed.prompt_tokens == sum(
        len(loaded.tokenizer(p)["input_ids"]) for p in ("The end", "a", "b")
    )
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    assert Speed(1, 5, 1011, 0.25, 2.0).describe() == (
        "1,011 tokens in 1 text; prompts: 5 tokens, first token after 0.250s; then 505.0 tokens/s"
    )
    found = Speed(2, 1, 1, 0.5).describe()
    assert found == "1 token in 2 texts; prompts: 1 token, first token after 0.500s"


@pytest.mark.parametrize("size", [1, 2, 7, 100])
@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two", [], "one two"),
        ("one two", ["tw"], "one "),
        ("one two", ["two", "ne"], "o"),
        ("aaab", ["aab"], "a"),
        ("abab", ["abc", "bab"], "a"),
        ("one tw", ["two"], "one tw"),
    ],
)
def test_a_text_ends_before_a_stop_text(text: str, stops: list[str], shown: str, size: int) -> None:
    finder = StopFinder(stops)
    pieces = [text[begin : begin + size] for begin in range(0, len(text), size)]
    assert "".join(finder.push(piece) for piece in pieces) + finder.close() == shown


def test_a_word_after_a_prompt_keeps_its_space(tmp_path: Path, loaded: LoadedModel) -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "\u2581a": 1, "\u2581b": 2, "</s>": 3}, "<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_named_tokenizer(str(tmp_path / "tokenizer.json"))
    generator = TextGenerator(LoadedModel(loaded.source, loaded.model, tokenizer))
    found: list[str] = []
    pieces = _Pieces(generator, [1], found.append)
    for value in (torch.tensor([[1]]), torch.tensor([2]), torch.tensor([1])):
        pieces.put(value)
    pieces.end()
    assert "".join(found) == " b a"
