"""What is printed of evaluations."""

from __future__ import annotations

from dataclasses import replace

from tests.utils.tools.evaluation.test_log import ONE
from utils.tools.evaluation.log import Evaluation
from utils.tools.evaluation.text import evaluation_lines, tables

TEXT = Evaluation(
    "checkpoint-epoch0-step20-files0",
    "validation",
    {
        "loss": 2.5,
        "perplexity": 12.182,
        "bits_per_byte": None,
        "tokens": 12345,
        "bytes": None,
        "tokens_per_second": 1999.6,
    },
    {
        "data": "f00",
        "samples": "covering",
        "sequence_length": 512,
        "stride": 64,
        "max_tokens": 5000,
        "mask_documents": True,
    },
    {"data": "gs://bucket/data"},
    20,
    time="2026-01-02T03:04:05.678+00:00",
)


def test_lines_of_a_checkpoint() -> None:
    assert evaluation_lines([ONE, TEXT]) == [
        "  hellaswag of hellaswag.jsonl:",
        "    acc 0.2500  acc_norm 0.5000 +-0.1000  items 20",
        "  validation of gs://bucket/data (512 tokens at once, stride 64, documents apart, the "
        "first 5,000 tokens):",
        "    loss 2.5000  perplexity 12.1820  bits/byte -  tokens 12,345  tokens/s 2,000  "
        "2026-01-02 03:04:05",
    ]


def test_a_table_for_each_question() -> None:
    other = replace(ONE, model="hub/model", step=None, values={"acc": 0.5, "f1": 0.1})
    found = tables([ONE, TEXT, other, replace(ONE, what={"limit": 5, "num_fewshot": 0})])
    assert [(title, len(rows)) for title, rows in found] == [
        ("hellaswag of hellaswag.jsonl", 2),
        (evaluation_lines([TEXT])[0].strip().rstrip(":"), 1),
        ("hellaswag of hellaswag.jsonl (0-shot, the first 5)", 1),
    ]
    rows = found[0][1]
    assert list(rows[0]) == list(rows[1]) == ["model", "step", "acc", "acc_norm", "items", "f1"]
    assert (rows[0]["f1"], rows[1]["step"], rows[1]["acc_norm"]) == ("-", "-", "-")
