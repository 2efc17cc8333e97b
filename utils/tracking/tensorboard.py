"""Curves, texts and hyperparameters of a run as TensorBoard shows them.

    metrics, texts of a run -> event file -> TensorBoard

Each run has a folder, and each branch of it: `--fresh` begins a curve beside the old one. The
starts of a run share its folder, one event file each, and make one curve. TensorBoard has two
loaders. One drops what comes after the step of a `START` record; the other drops, for each tag,
what is not before the next step that it reads. So a start begins with that record, and within a tag
steps only grow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.base.text import printable, to_json_text
from utils.tracking.event_file import EventFile
from utils.tracking.tracker import RunStart, RunTracker, group_metrics

FOLDER = "tensorboard"
# Protocol buffers are filled in here: what TensorBoard and torch have for it imports all of
# TensorBoard, at every start. A test compares.

# What the HPARAMS tab compares runs by.
_COMPARED_METRICS = ("validation/best_loss", "validation/loss", "train/loss")
_COMPARED_KEYS = ("learning_rate", "max_steps", "num_parameters", "seed", "tokens_per_step")
MAX_LINE = 2000


class TensorBoardTracker(RunTracker):
    """Writes the event file of one start.

    Args:
        logs: The run's log directory.
    """

    name = "tensorboard"

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._logs = logs
        self._start: RunStart | None = None
        self._file: EventFile | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return "TensorBoard"

    def _begin(self, start: RunStart) -> None:
        self._start = start
        self._open()

    def _open(self) -> EventFile | None:
        """Return the file of this start; one that could not be made before is tried again."""
        start = self._start
        if self._file is None and start is not None:
            file = EventFile(self._logs / FOLDER / start.curve)
            try:
                _introduce(start, file)
            except BaseException:
                file.discard()
                raise
            self._file = file
        return self._file

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if file := self._open():
            file.add(_scalars(values), step)

    def _log_lines(self, title: str, lines: Sequence[str], step: int) -> None:
        if file := self._open():
            file.add(_text(title, _as_code("\n".join(lines))), step)

    def _log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        if file := self._open():
            texts = [
                f"{_as_code(prompt or '(end of text)')}\n\ngoes on with\n\n{_as_code(text)}"
                for prompt, text in samples
            ]
            file.add(_text("samples", "\n\n---\n\n".join(texts)), step)

    def _roll_back(self, step: int) -> None:
        if file := self._open():
            file.purge_from(step + 1)

    def _end(self, outcome: str) -> None:
        file, start = self._file, self._start
        self._start = self._file = None
        if file is None or start is None:
            return
        try:
            if outcome == "done":
                file.add(_session_end())
        finally:
            file.close()


def _introduce(start: RunStart, file: EventFile) -> None:
    """Write what comes before the first metrics of a start."""
    file.purge_from(start.step + 1)
    for step, values in start.missing:
        file.add(_scalars(values), step)
    file.add(_experiment(start))
    file.add(_session(start))
    # One step on, so that another start from here takes it back.
    file.add(_text("configuration", describe_configuration(start)), start.step + 1)


def describe_configuration(start: RunStart) -> str:
    """Return what a start was given, as a table in Markdown."""
    rows = [f"Start at step {start.step}.", "", "| key | value |", "|---|---|"]
    for key, value in {**start.facts, **start.config.to_json()}.items():
        text = value if isinstance(value, str) else to_json_text(value, indent=None)
        shown = printable(text, MAX_LINE).replace("`", "'").replace("|", "\\|")
        rows.append(f"| {key} | {f'`{shown}`' if shown else ''} |")
    return "\n".join(rows)


def _as_code(text: str) -> str:
    """Return text as a code block of Markdown, which takes nothing in it for anything else."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _scalars(values: Mapping[str, Any]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(
        value=[
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in group_metrics(values).items()
        ]
    )


def _text(tag: str, markdown: str) -> Any:
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[markdown.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    return _plugin_summary(f"{tag}/text_summary", "text", b"", tensor)


def _experiment(start: RunStart) -> Any:
    """Return the summary that declares the names of hyperparameters and metrics."""
    from tensorboard.plugins.hparams import api_pb2

    infos = []
    for name, value in start.hyperparameters.items():
        kind = "DATA_TYPE_STRING" if isinstance(value, str) else "DATA_TYPE_FLOAT64"
        # Those that differ between runs come first in the table; these are the ones to compare.
        info = {"name": name, "type": kind, "differs": name in _COMPARED_KEYS}
        infos.append(api_pb2.HParamInfo(**info))
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in _COMPARED_METRICS]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics)
    return _hyperparameters("experiment", experiment=experiment)


def _session(start: RunStart) -> Any:
    """Return the summary that has the values of a run's hyperparameters."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    session = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in start.hyperparameters.items():
        if isinstance(value, str):
            session.hparams[name].string_value = value
        else:
            session.hparams[name].number_value = value
    return _hyperparameters("session_start_info", session_start_info=session)


def _session_end() -> Any:
    """Return the summary that says that a run is done."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    status = api_pb2.Status.Value("STATUS_SUCCESS")
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return _hyperparameters("session_end_info", session_end_info=end)


def _hyperparameters(name: str, **content: Any) -> Any:
    """Return a summary for the HPARAMS tab, which reads nothing but its metadata."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.hparams import plugin_data_pb2

    data = plugin_data_pb2.HParamsPluginData(**content)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)])
    empty = TensorProto(dtype="DT_FLOAT", tensor_shape=shape)
    return _plugin_summary(f"_hparams_/{name}", "hparams", data.SerializeToString(), empty)


def _plugin_summary(tag: str, plugin: str, content: bytes, tensor: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content)
    metadata = SummaryMetadata(plugin_data=data)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
