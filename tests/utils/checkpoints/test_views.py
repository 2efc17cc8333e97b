import json
import math
import os
from pathlib import Path

import pytest

from tests.sample_checkpoints import make_checkpoint, put_remote, seal
from utils.base.errors import CheckpointError, UsageError
from utils.base.text import number, printable, to_json_text
from utils.checkpoints.journal import Journal, UploadState
from utils.checkpoints.layout import CheckpointName, sidecar_object
from utils.checkpoints.views import (
    CheckpointView,
    choose_name,
    find_best,
    find_latest_view,
    read_json_object,
    read_local_checkpoint,
    read_local_checkpoints,
)
from utils.remote.listing import read_remote_checkpoints
from utils.storage.directory import DirectoryBucket
from utils.tracking.metrics_log import MetricsLog, append_metrics, loss_trend, read_metrics


def view(step, loss=None, validation_loss=None, problem=None):
    metadata = {"current_loss": loss, "validation_metrics": {"validation_loss": validation_loss}}
    return CheckpointView(CheckpointName(step, 0, 0), metadata, None, problem=problem)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1.0), (2.5, 2.5), *((v, None) for v in (True, "3", math.nan, math.inf, 10**400, [1]))],
)
def test_number_takes_finite_numbers_only(value, expected):
    assert number(value) == expected


def test_printable_leaves_nothing_that_steers_a_terminal():
    text = printable("a\x1b[31m\nb\u202e\ud800c\x07")
    assert text == "a?[31m?b??c?"
    assert len(printable("x" * 1000)) == 300


def test_json_text_is_strict_json():
    value = {"nan": math.nan, "list": [math.inf, (1.5,)], "path": Path("a")}
    parsed = json.loads(to_json_text(value), parse_constant=pytest.fail)
    assert parsed == {"nan": None, "list": [None, [1.5]], "path": "a"}


def test_fifo_in_place_of_a_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "metadata.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json_object(tmp_path / "metadata.json")


def test_oversized_file_is_refused_unread(tmp_path):
    path = tmp_path / "metadata.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="the limit is"):
        read_json_object(path)


def test_local_checkpoints_come_by_step_with_their_newest_upload_state(tmp_path):
    for step in (100, 50, 1000):
        make_checkpoint(tmp_path, step)
    journal = Journal(tmp_path / "uploads.jsonl")
    journal.record("checkpoint-epoch0-step50-files0", "run", UploadState.QUEUED)
    journal.record("checkpoint-epoch0-step50-files0", "run", UploadState.VERIFIED)
    views = read_local_checkpoints(tmp_path)
    assert [found.name.step for found in views] == [50, 100, 1000]
    assert views[0].upload.state is UploadState.VERIFIED
    assert [found.problem for found in views] == [None, None, None]
    assert read_local_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("metadata.json", "{", "metadata.json cannot be read"),
        ("metadata.json", None, "metadata.json is missing"),
        ("manifest.json", "[]", "holds no JSON object"),
        ("manifest.json", '{"format": 1, "step": 1e999}', "not a usable manifest"),
        ("manifest.json", "[" * 200_000, "manifest.json cannot be read"),
    ],
)
def test_damaged_checkpoint_is_listed_with_its_problem(tmp_path, name, content, reason):
    make_checkpoint(tmp_path, 50)
    damaged = make_checkpoint(tmp_path, 100)
    (damaged / name).unlink()
    if content is not None:
        (damaged / name).write_text(content)
    intact, broken = read_local_checkpoints(tmp_path)
    assert intact.problem is None
    assert reason in broken.problem


def test_renamed_checkpoint_is_a_problem(tmp_path):
    path = make_checkpoint(tmp_path, 50)
    moved = path.rename(tmp_path / "checkpoint-epoch0-step60-files0")
    assert "its manifest is of step 50" in read_local_checkpoint(moved).problem


def test_other_directory_names_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint directory"):
        read_local_checkpoint(tmp_path / "checkpoint-epoch0-step1-files0.old")


@pytest.mark.parametrize(
    "value",
    [
        [1],
        {"current_loss": "x", "validation_metrics": 3},
        {"current_loss": math.inf, "validation_metrics": {"validation_loss": [1]}},
        {"current_loss": {}, "validation_metrics": {"validation_loss": math.nan}},
    ],
)
def test_any_json_as_metadata_gives_a_view_with_usable_losses(tmp_path, value):
    path = make_checkpoint(tmp_path, 50)
    (path / "metadata.json").write_text(json.dumps(value), "utf-8")
    seal(path, 50)
    found = read_local_checkpoint(path)
    assert (found.loss, found.validation_loss) == (None, None)
    assert isinstance(value, dict) == (found.problem is None)
    json.loads(to_json_text(found.metadata), parse_constant=pytest.fail)


def test_metadata_that_are_not_those_of_the_manifest_are_shown_as_damaged(tmp_path):
    good, bad = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    text = (bad / "metadata.json").read_text("utf-8")
    loss = json.loads(text)["validation_metrics"]["validation_loss"]
    (bad / "metadata.json").write_text(text.replace(str(loss), "0.1"), "utf-8")
    for brief in (False, True):
        sound, damaged = (read_local_checkpoint(path, brief=brief) for path in (good, bad))
        assert sound.problem is None
        assert damaged.problem == "metadata.json is damaged (its crc32c is not the manifest's)"
        assert damaged.validation_loss == 0.1  # what can be read is shown
        assert find_best([sound, damaged]) is sound


def test_remote_checkpoints_come_from_their_sidecars_and_other_objects_are_none(tmp_path):
    bucket = DirectoryBucket(tmp_path / "bucket")
    for step in (100, 50):
        put_remote(tmp_path / "bucket", make_checkpoint(tmp_path / "local", step))
    put_remote(tmp_path / "bucket" / "other-run", make_checkpoint(tmp_path / "local", 60))
    bucket.put_bytes("Checkpoints/notes.json", b"{}")
    bucket.put_bytes("Checkpoints/checkpoint-epoch0-step5-files0.tar.gz", b"no sidecar yet")
    bucket.put_bytes("Checkpoints-old/checkpoint-epoch0-step6-files0.json", b"{}")
    older = "Checkpoints/checkpoint-epoch0-step50-files0.tar.zst"  # left by a kill
    bucket.put_bytes(older, b"in another format")
    os.utime(bucket.root / older, (1, 1))
    views = read_remote_checkpoints(bucket)
    assert [(found.name.step, found.problem) for found in views] == [(50, None), (100, None)]
    assert views[0].archive_bytes == len(b"archive")
    assert views[0].loss == pytest.approx(6.464046)
    assert views[0].manifest is not None


@pytest.mark.parametrize("sidecar", [b"{", b"null", b"[" * 200_000, b'{"manifest": 1}'])
def test_damaged_sidecar_is_listed_with_its_problem(tmp_path, sidecar):
    bucket = DirectoryBucket(tmp_path / "bucket")
    put_remote(tmp_path / "bucket", make_checkpoint(tmp_path / "local", 50))
    bucket.put_bytes(sidecar_object("checkpoint-epoch0-step60-files0"), sidecar)
    intact, broken = read_remote_checkpoints(bucket)
    assert intact.problem is None
    assert "checkpoint-epoch0-step60-files0.json" in broken.problem


def test_sidecar_without_archive_says_so(tmp_path):
    put_remote(tmp_path / "bucket", make_checkpoint(tmp_path / "local", 50))
    (tmp_path / "bucket/Checkpoints/checkpoint-epoch0-step50-files0.tar.gz").unlink()
    (only,) = read_remote_checkpoints(DirectoryBucket(tmp_path / "bucket"))
    assert only.problem == "its archive is not in the bucket"


@pytest.mark.parametrize(
    ("views", "best"),
    [
        ([], None),
        ([view(1), view(2)], None),
        ([view(1, loss=2.0), view(2, loss=3.0)], 1),
        ([view(1, loss=1.0, validation_loss=3.0), view(2, loss=2.0, validation_loss=2.0)], 2),
        ([view(1, loss=1.0), view(2, loss=9.0, validation_loss=9.0)], 2),
        ([view(1, validation_loss=2.0), view(2, validation_loss=2.0)], 2),
        ([view(1, validation_loss=math.nan), view(2, validation_loss=5.0)], 2),
        ([view(1, loss=1.0, problem="damaged"), view(2, loss=2.0)], 2),
        ([view(1, loss=1.0, problem="damaged"), view(2)], 1),
    ],
)
def test_best_is_the_lowest_validation_loss_and_the_newest_of_equals(views, best):
    found = find_best(views)
    assert (found and found.name.step) == best


def test_latest_is_the_newest_without_a_problem():
    assert find_latest_view([]) is None
    assert find_latest_view([view(1), view(2, problem="damaged")]).name.step == 1
    assert find_latest_view([view(1, problem="damaged")]).name.step == 1


def test_resume_takes_back_every_later_step(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    append_metrics(path, {"event": "start", "step": 0})
    for step in (10, 20, 30):
        append_metrics(path, {"step": step, "loss": float(step)})
    append_metrics(path, {"event": "resume", "step": 20})
    append_metrics(path, {"step": 30, "loss": 300.0})
    metrics = read_metrics(path)
    assert metrics.series("loss") == ([10, 20, 30], [10.0, 20.0, 300.0])
    assert [event["event"] for event in metrics.events] == ["start", "resume"]


def test_reading_goes_on_where_it_stopped(tmp_path):
    path, metrics = tmp_path / "metrics.jsonl", MetricsLog()
    assert not metrics.read_new(path)
    append_metrics(path, {"step": 1, "loss": 1.0})
    assert metrics.read_new(path)
    assert not metrics.read_new(path)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert not metrics.read_new(path)
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    assert metrics.read_new(path)
    assert metrics.series("loss") == ([1, 2], [1.0, 2.0])
    assert metrics.bad_lines == 0


def test_torn_line_of_a_crash_does_not_swallow_the_next_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 30, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    append_metrics(path, {"event": "resume", "step": 20})
    metrics = read_metrics(path)
    assert metrics.bad_lines == 1
    assert metrics.records == []
    assert metrics.events[0]["event"] == "resume"


def test_unreadable_lines_are_counted_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = [b"{", b"[]", b'{"loss": 1}', b'{"step": 1e999}', b'{"step": null}', b"[" * 200_000, b""]
    good = [b'{"step": "7", "loss": 1.0}', b'{"event": "resume", "step": 9}']
    path.write_bytes(b"\n".join([*bad, *good, b""]))
    for step, loss in enumerate([1.0, math.nan, "x", None, 2.0], 10):
        append_metrics(path, {"step": step, "loss": loss})
    metrics = read_metrics(path)
    assert metrics.bad_lines == len(bad)
    assert metrics.series("loss") == ([7, 10, 14], [1.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("losses", "trend"),
    [
        ([], "unknown"),
        ([1.0], "unknown"),
        ([2.0, 1.0], "improving"),
        ([1.0, 2.0], "worsening"),
        ([1.0, 1.001], "flat"),
        ([9.0] * 200 + [1.0] * 100, "flat"),
        ([0.0, 0.0], "flat"),
    ],
)
def test_trend_compares_the_newer_half_with_the_older(losses, trend):
    assert loss_trend(losses) == trend


def test_values_nested_beyond_any_stack_are_shown_as_such():
    value = []
    for _ in range(100_000):
        value = [value]
    assert printable(value) == "(too deep)"
    assert to_json_text({"a": value}, indent=None).endswith('["(too deep)"' + "]" * 32 + "}")


@pytest.mark.parametrize(
    ("history", "kept"),
    [
        ("[1.5, 2e-3, -3]", [-3]),
        ("[\n 1,\n null\n]", [None]),
        ("[4]", [4]),
        ("[]", []),
        ('[1, "]", 2]', ["]", 2]),
        ("[1, [2, 3], 4]", [[2, 3], 4]),
    ],
)
def test_brief_reading_takes_the_last_of_each_history(tmp_path, history, kept):
    path = make_checkpoint(tmp_path, 50, note='"loss_history": [1, 2]', loss_history="PLACE")
    metadata = (path / "metadata.json").read_text().replace('"PLACE"', history)
    (path / "metadata.json").write_text(metadata)
    whole = read_local_checkpoint(path).metadata
    brief = read_local_checkpoint(path, brief=True).metadata
    assert brief == {**whole, "loss_history": kept, "learning_rates": [0.004]}
    assert brief["note"] == '"loss_history": [1, 2]'


def test_brief_reading_names_damage_between_the_numbers(tmp_path):
    path = make_checkpoint(tmp_path, 50)
    text = (path / "metadata.json").read_text()
    (path / "metadata.json").write_text(text.replace('"loss_history": [', '"loss_history": [x, '))
    assert "cannot be read" in read_local_checkpoint(path, brief=True).problem


NAMES = [
    CheckpointName(step, epoch, files)
    for step, epoch, files in ((5, 0, 0), (50, 0, 1), (100, 1, 0), (100, 1, 3))
]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("5", 0),
        ("checkpoint-epoch0-step5-files0", 0),
        ("epoch0-step50", 1),
        ("files3", 3),
    ],
)
def test_a_name_is_found(text: str, index: int) -> None:
    assert choose_name(text, NAMES) == NAMES[index]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("100", "fits checkpoint-epoch1-step100-files0, checkpoint-epoch1-step100-files3"),
        ("epoch0", "Write more of the name"),
        ("3", "There is no checkpoint '3'"),  # digits alone are a step, not the end of files3
        ("", "There is no checkpoint ''"),
    ],
)
def test_what_fits_none_or_several_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_name(text, NAMES)
