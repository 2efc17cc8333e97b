"""The trained model that a run begins with (`init_from`): architecture, tokenizer, weights.

    directory, bucket, Hub -> config.json -> model config; weights -> the model of every rank

The main process alone needs it, and only where a run begins: checkpoints keep its `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.model_config import CONFIG_FILE
from configs.training_config import TrainingConfig
from utils.base import ranks
from utils.base.errors import ConfigError
from utils.base.progress import ProgressDisplay
from utils.base.text import printable, reason_of
from utils.checkpoints.views import read_json_object
from utils.models.tokenizer import find_difference, find_tokenizer, find_tokenizer_folder
from utils.remote.finding import find_placed_model, is_checkpoint_word, model_on_hub
from utils.remote.loading import ModelSource, load_model


@dataclass(frozen=True)
class Base:
    """A trained model that a run begins with, or has begun with.

    Attributes:
        record: What `metadata.json` says of it: its name, its `config`; run and step of a
            checkpoint, the revision of a model on the Hub.
        source: Where it is; None where a run goes on, which does not need it.
    """

    record: Mapping[str, Any]
    source: ModelSource | None = None

    def find_other_tokens(self, tokenizer: Any) -> str | None:
        """Say in what a tokenizer of data differs from the model's; None where they are the same.

        Raises:
            LookupError: The model has none.
            Exception: Of any family: it cannot be loaded.
        """
        own = find_tokenizer(self.source.location) if self.source is not None else None
        if own is None:
            raise LookupError(f"{self.record['name']} has no tokenizer")
        return find_difference(tokenizer, own)

    def load_into(self, core: Any) -> None:
        """Give the model of each rank, still on the CPU, the weights; every rank calls this.

        Raises:
            CheckpointError: A checkpoint is damaged.
            UsageError: The weights cannot be loaded.
        """
        import torch

        def read() -> None:
            assert self.source is not None
            loaded = load_model(self.source, device="cpu", dtype="float32", attention="eager")
            core.load_state_dict(loaded.model.state_dict())

        ranks.compute_on_main(read)
        if ranks.are_ranks_connected():
            for tensor in core.state_dict().values():
                torch.distributed.broadcast(tensor, src=0, group=ranks.host_group())


def find_base(config: TrainingConfig) -> Base:
    """Return the model that `init_from` names; what is in a bucket is downloaded.

    Raises:
        ConfigError: The Hub does not give it, it is quantized, or the name of a checkpoint alone.
        UsageError: There is no such model.
        CheckpointError: It is damaged or incomplete.
        StorageError: The bucket cannot be read.
    """
    text = config.init_from
    with ProgressDisplay(enabled=ranks.is_main_rank()) as display:
        source = find_placed_model(text, config, display.update)
    if source is None and is_checkpoint_word(text):
        raise ConfigError(
            f"init_from {text}: name a checkpoint with its directory or bucket, such as "
            "other/checkpoints/NAME or gs://my-bucket/other/latest."
        )
    source = source or model_on_hub(text)
    try:
        folder = find_tokenizer_folder(source.location)
    except Exception as exc:  # of the Hub's client, of many families
        raise ConfigError(
            f"init_from {printable(text)} is no directory here, and the Hugging Face Hub does not "
            f"give it: {reason_of(exc)}"
        ) from exc
    record: dict[str, Any] = {"name": source.name, "config": read_json_object(folder / CONFIG_FILE)}
    if record["config"].get("quantization_config"):
        raise ConfigError(
            f"init_from {printable(text)} is quantized: only weights of whole precision can be "
            "trained on. Name the model that it was made from."
        )
    if source.manifest is not None:
        record |= {"run_id": source.manifest.run_id, "step": source.manifest.step}
    elif source.directory is None:
        record["revision"] = folder.name
    return Base(record, source)
