"""What the smaller models of a comparison start from: channels of the model that the dense row starts from."""

from __future__ import annotations

from pathlib import Path

from p3b.methods.base import overall_keep_ratio
from p3b.run.inputs import open_model, open_splits
from p3b.run.options import DataOptions, ModelOptions
from p3b.storage import artifact
from p3b.train.distributed import Processes, gather, wait_for_all
from p3b.vit.architecture import describe_dense
from p3b.vit.layout import read_layout
from p3b.vit.smaller import cut_evenly, smaller_architecture


def make_start(
    start: Path,
    data: DataOptions,
    model: ModelOptions,
    processes: Processes,
    *,
    ratio: float,
    blocks_only: bool,
    seed: int,
) -> None:
    """Write a smaller model, with weights of the dense one, where it is not there yet.

    Args:
        start: folder to write it to.
        data: that it will be trained on.
        model: that the dense row of this seed starts from.
        processes: this one among all; the main one writes.
        ratio: share of the parameters that is to go.
        blocks_only: whether the share is counted over the blocks alone.
        seed: of the run.
    """
    if gather(artifact.is_artifact(start))[0]:
        return
    splits = open_splits(data, seed, processes)
    dense = open_model(model, len(splits.class_names), seed)
    layout = read_layout(dense.model)
    in_blocks = sum(parameter.numel() for parameter in dense.model.parameters()) - layout.other_params
    kept = overall_keep_ratio(layout, ratio, blocks_only) * in_blocks
    architecture = smaller_architecture(describe_dense(dense.model), kept + layout.other_params)
    if processes.is_main:
        artifact.save(
            cut_evenly(dense.model, architecture),
            start,
            class_names=dense.class_names if len(dense.class_names or ()) == len(splits.class_names) else None,
            preprocessing=dense.preprocessing.to_dict(),
            provenance={"stage": "start of a smaller model", "model": model.model, "seed": seed},
        )
    wait_for_all()
