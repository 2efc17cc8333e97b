"""The model that a user means, wherever it is.

    checkpoint's name, directory, gs:// archive or folder, Hub name -> model source

A directory is taken first, then a bucket's URI, then a checkpoint of the run (here, else in its
bucket), then a name on the Hugging Face Hub. No torch here.
"""

from __future__ import annotations

from pathlib import Path

from configs.training_config import TrainingConfig
from utils.base.errors import UsageError
from utils.base.progress import OnProgress
from utils.base.uri import join_uri
from utils.checkpoints.layout import validate_run_name
from utils.checkpoints.loading import ModelSource
from utils.remote.finding import (
    find_placed_model,
    is_checkpoint_word,
    model_in_bucket,
    model_in_directory,
    model_on_hub,
)
from utils.tools.viewer.shelf import open_shelf


def find_model(
    text: str,
    config: TrainingConfig,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> ModelSource:
    """Return where the model is that a user means; what is in a bucket is downloaded.

    Args:
        text: A checkpoint's name, step, `latest` or `best`; a directory of a checkpoint or of an
            exported model; `gs://BUCKET/PREFIX/NAME` of an archive or of an exported model; or a
            name on the Hub.
        config: Says where the run's checkpoints are, and its bucket.
        on_progress: Told of a download: stage, bytes done, bytes in all.

    Raises:
        UsageError: There is no such model, or it is not clear which one is meant.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    found = find_placed_model(text, config, on_progress)
    if found is not None:
        return found
    with open_shelf(config) as shelf:
        problem = ""
        try:
            return model_in_directory(Path(shelf.where) / str(shelf.select(text).name))
        except UsageError as exc:
            problem = str(exc)
    if is_checkpoint_word(text):
        if not config.checkpoint_uri:
            raise UsageError(problem)
        uri = join_uri(config.checkpoint_uri, validate_run_name(config.run_name))
        return model_in_bucket(uri, text, config, on_progress)
    return model_on_hub(text)
