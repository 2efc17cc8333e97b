from pathlib import Path

import pytest

from utils.base.errors import DataError
from utils.corpus.text_sources.sample import SampleSource, _collect_sample


def test_python_without_library_sources_is_an_error_that_proposes_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--input"):
        list(SampleSource(tmp_path).documents())


def test_sample_skips_what_does_not_parse_and_is_the_same_each_time(tmp_path: Path) -> None:
    docstring = "A sentence about something useful. " * 8
    for number in range(500):
        (tmp_path / f"m{number}.py").write_text(f'"""{docstring}{number}"""\nx = "\\d"\n')
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text(f'"""HIDDEN {docstring}"""\n')

    source = SampleSource(tmp_path)
    documents = list(source.documents())

    _collect_sample.cache_clear()
    assert list(SampleSource(tmp_path).documents()) == documents
    assert source.fingerprint() == SampleSource(tmp_path).fingerprint()
    assert sum(docstring.strip() in text for text in documents) == 500
    assert not any("HIDDEN" in text for text in documents)
