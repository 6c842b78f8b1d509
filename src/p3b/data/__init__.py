"""Data sets by name, folder or archive; transforms; loaders. Knows nothing of pruning."""

from p3b.data.cache import keep_decoded
from p3b.data.datasets import KNOWN_DATA_SETS, DataSplits, open_data
from p3b.data.loaders import EvalBatches, TrainBatches, default_num_workers, eval_batches, train_batches
from p3b.data.transforms import Augmentation, Preprocessing, mixup
from p3b.data.workers import worker_death

__all__ = [
    "KNOWN_DATA_SETS",
    "Augmentation",
    "DataSplits",
    "EvalBatches",
    "Preprocessing",
    "TrainBatches",
    "default_num_workers",
    "eval_batches",
    "keep_decoded",
    "mixup",
    "open_data",
    "train_batches",
    "worker_death",
]
