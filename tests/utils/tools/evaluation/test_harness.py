"""The way to lm-evaluation-harness, which itself runs in tests/test_lm_evaluation_harness.py."""

from __future__ import annotations

from utils.tools.evaluation.harness import harness_values


def test_figures_have_plain_names() -> None:
    row = {
        "alias": "task",
        "name": "task",
        "sample_len": 20,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "perplexity_stderr,none": "N/A",
        "exact_match,flexible-extract": 0.25,
        "exact_match_stderr,flexible-extract": float("nan"),
    }
    assert harness_values(row) == {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "exact_match (flexible-extract)": 0.25,
        "exact_match (flexible-extract)_stderr": None,
    }
