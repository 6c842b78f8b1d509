"""Data sets by name, folder or archive; how an image is prepared; transforms; loaders. Knows nothing of pruning."""

from p3b.data.cache import keep_decoded
from p3b.data.datasets import KNOWN_DATA_SETS, DataSplits, open_data
from p3b.data.images import LabelledImages
from p3b.data.loaders import EvalBatches, TrainBatches, default_num_workers, eval_batches, train_batches
from p3b.data.prepare import prepare_image, read_image
from p3b.data.train_record import TrainRecord, record_training, seen_in_training
from p3b.data.transforms import Augmentation, Preprocessing, mixup
from p3b.data.workers import worker_death

__all__ = [
    "KNOWN_DATA_SETS",
    "Augmentation",
    "DataSplits",
    "EvalBatches",
    "LabelledImages",
    "Preprocessing",
    "TrainBatches",
    "TrainRecord",
    "default_num_workers",
    "eval_batches",
    "keep_decoded",
    "mixup",
    "open_data",
    "prepare_image",
    "read_image",
    "record_training",
    "seen_in_training",
    "train_batches",
    "worker_death",
]
