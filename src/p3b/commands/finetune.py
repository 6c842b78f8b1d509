"""`p3b finetune`: train a small model further."""

from __future__ import annotations

from typing import Any

from p3b.commands.train import train
from p3b.data import DataSplits
from p3b.errors import ConfigError
from p3b.run.options import FinetuneConfig
from p3b.run.products import PRODUCTS, SPARSE_CHECKPOINT


def finetune(config: FinetuneConfig, splits: DataSplits | None = None) -> dict[str, Any]:
    """Fine-tune the model at --model-path; returns the summary. For the arguments see `p3b.commands.train.train`.

    Raises:
        ConfigError: no model path. Besides, see `p3b.commands.train.train`.
    """
    if config.model.model_path is None:
        raise ConfigError(
            f"--model-path is missing: the model to fine-tune, such as run/{PRODUCTS['prune']} or run/{SPARSE_CHECKPOINT}."
        )
    return train(config, "finetune", splits)
