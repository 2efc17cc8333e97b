from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from utils.corpus.text_sources.records import parquet_documents
from utils.corpus.token_files.tables import read_parquet

READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "text": lambda path: parquet_documents(path, "text", None),
    "ids": lambda path: read_parquet(path, "ids", None),
}


@pytest.mark.parametrize("num_groups", [1, 40])
@pytest.mark.parametrize("kind", READERS)
def test_a_parquet_file_is_in_memory_a_little_at_a_time(
    tmp_path: Path, kind: str, num_groups: int
) -> None:
    values = np.random.default_rng(0).integers(2**30, size=(20_000, 100))
    column = [row.tobytes().hex() for row in values] if kind == "text" else list(values)
    path = tmp_path / "a.parquet"
    rows = len(column) // num_groups
    pyarrow.parquet.write_table(pyarrow.table({kind: column}), path, row_group_size=rows)
    del values, column

    before, most = pyarrow.total_allocated_bytes(), 0
    for _ in READERS[kind](path):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert 0 < most < path.stat().st_size / 2
