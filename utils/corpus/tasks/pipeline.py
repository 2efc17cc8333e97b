"""The last step of a datatrove pipeline of anybody's own: its documents become our shards.

    reader --> filters, deduplication --> WriteShards --> OUTPUT/task-0000I/
    all tasks done: prepare_data.py merge OUTPUT --> index.json

datatrove says which tasks are done; one that was cut short begins its part again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from datatrove.pipeline.base import PipelineStep

from utils.corpus.output import open_output
from utils.corpus.prepare import (
    DEFAULT_SHARD_TOKENS,
    DEFAULT_VALIDATION_FRACTION,
    CorpusOptions,
)
from utils.corpus.tasks.tasks import TaskedCorpus


class WriteShards(PipelineStep):
    """Writes the documents that reach it as token shards, each task a part of OUTPUT.

    `tokenizer` is what --tokenizer of prepare_data.py takes, `output` a directory or
    gs://bucket/prefix of this pipeline alone.
    """

    type = "WRITER"
    name = "NPZ token shards"

    def __init__(
        self,
        output: str,
        tokenizer: str,
        *,
        validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
        shard_tokens: int = DEFAULT_SHARD_TOKENS,
        compress: bool = False,
    ) -> None:
        super().__init__()
        self.output = output
        self.options = CorpusOptions(
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
            compress=compress,
        )

    def run(self, data: Iterable[Any] | None, rank: int = 0, world_size: int = 1) -> None:
        """Write all documents of a task; nothing is passed on.

        Raises:
            UsageError: The output holds other data, or the tokenizer cannot be used.
        """
        corpus = TaskedCorpus([_StepSource(data or ())], (), self.options, world_size)
        with closing(open_output(self.output)) as bucket:
            corpus.prepare(bucket, rank, overwrite=True)


@dataclass(frozen=True)
class _StepSource:
    """The texts that come out of a pipeline, once; the part of this task already."""

    data: Iterable[Any]

    holds_tokens = False

    def documents(self) -> Iterator[str]:
        return (document.text for document in self.data)

    def fingerprint(self) -> str:
        """Return what no other run has: what comes out of a pipeline cannot be compared."""
        return uuid.uuid4().hex

    def uses(self, option: str) -> bool:
        return False

    def part(self, number: int, count: int) -> _StepSource:
        return self

    def outline(self) -> list[Any]:
        return ["pipeline"]
