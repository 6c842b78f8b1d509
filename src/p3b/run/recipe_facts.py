"""The facts that recipes are chosen from: a look at the data, the model's shape, and the machine. No weights are read."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache

import numpy as np
import timm
import torch
from timm.models import split_model_name_tag
from timm.models.vision_transformer import VisionTransformer

from p3b.data import DataSplits
from p3b.data.cache import available_memory
from p3b.data.images import LabelledImages
from p3b.errors import DataError, ModelError
from p3b.run.inputs import open_model
from p3b.run.options import ModelOptions, TrainingOptions
from p3b.run.recipe_terms import Facts
from p3b.storage import artifact
from p3b.storage.models import parse_model_kwargs
from p3b.train.distributed import Processes
from p3b.vit.anatomy.weights import STREAM
from p3b.vit.compensation import require_compensable
from p3b.vit.families import family_of, images_of, width_of
from p3b.vit.layout import ModelLayout, read_layout
from p3b.vit.valueless import without_values

LOOKED_AT = 48
"""Images whose size is looked up."""


def read_facts(
    splits: DataSplits, options: ModelOptions, processes: Processes, device: torch.device, *, seed: int, prunes: bool
) -> Facts:
    """Look at what a run would work on.

    Args:
        splits: of the data.
        options: of the model.
        processes, device: that would train.
        seed: of the run.
        prunes: whether it prunes.

    Raises:
        ModelError, WeightsError, ConfigError: a model that cannot be built.
    """
    counts = np.bincount(splits.train.targets, minlength=len(splits.class_names))
    sides = [min(size) for size in image_sizes(splits.train, LOOKED_AT)]
    model = shape_of(options, len(splits.class_names), seed)
    return Facts(
        images=len(splits.train),
        classes=len(splits.class_names),
        smallest=int(counts.min()),
        largest=int(counts.max()),
        side=int(np.median(sides)) if sides else images_of(model).size[0],
        symbols=all(len(name) == 1 for name in splits.class_names),
        input_size=images_of(model).size[0],
        resizable=_is_resizable(options, model),
        patch_size=images_of(model).patch[0],
        width=width_of(model),
        depth=len(family_of(model).blocks(model)),
        pretrained=options.model_pretrained or options.model_path is not None,
        on_gpu=device.type == "cuda",
        memory=_memory(device) // (1 if device.type == "cuda" else processes.local_world_size),
        processes=processes.world_size,
        prunes=prunes,
        narrows=prunes and (layout := _narrow_layout(model)) is not None,
        compensates=prunes and layout is not None and _compensates(model, layout),
    )


def _narrow_layout(model: VisionTransformer) -> ModelLayout | None:
    """Map of a model whose residual stream and whole heads are prunable; models in stages have more than one stream."""
    try:
        return read_layout(model, ("heads", "head", "hidden", STREAM))
    except ModelError:  # what cannot be pruned at all is refused later, in the words of its method
        return None


def _compensates(model: VisionTransformer, layout: ModelLayout) -> bool:
    """Whether a cut in one shot can be made up for."""
    try:
        require_compensable(model, layout)
    except ModelError:
        return False
    return True


def steps_of_epoch(images: int, training: TrainingOptions, processes: int) -> int:
    """Optimizer steps of an epoch over so many images, as the loaders make them: a last batch that is not full is left out."""
    return -(-max(1, images // (training.batch_size * processes)) // training.grad_accum_steps)


def image_sizes(images: LabelledImages, most: int) -> list[tuple[int, int]]:
    """(width, height) of at most so many images, evenly spread; those that cannot be read are left out."""
    sizes = []
    for position in np.unique(np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)).tolist():
        try:
            sizes.append(images[position][0].size)
        except DataError:
            continue
    return sizes


def shape_of(options: ModelOptions, num_classes: int, seed: int) -> VisionTransformer:
    """The model as it will be trained, but for its weights: those of a file are read only where they bring the shape along."""
    path = options.model_path
    brings_shape = path is not None and artifact.is_artifact(path)
    options = replace(options, model_pretrained=False, model_path=path if brings_shape else None)
    is_known = timm.is_model(split_model_name_tag(options.model)[0])  # what others are called alike is looked for by building
    with without_values() if is_known and not brings_shape else nullcontext():  # where a model costs nothing
        return open_model(options, num_classes, seed).model


def weights_fit(options: ModelOptions) -> bool:
    """Whether timm's weights of a name fit the shape that is asked for: they can be resampled to other images and patches."""
    if not options.model_kwargs:
        return True
    options = replace(options, mean=None, std=None)  # of the channels that are asked for, which the named model may not have
    return _sizes(options) == _sizes(replace(options, model_kwargs=(), input_size=None))


@lru_cache(maxsize=16)
def _sizes(options: ModelOptions) -> dict[str, torch.Size]:
    """Sizes of all weights that cannot be resampled, by key. Kept, since commands that run others ask for the same again."""
    return {key: tensor.shape for key, tensor in shape_of(options, 1, 0).state_dict().items() if key not in _RESAMPLED}


_RESAMPLED = ("pos_embed", "patch_embed.proj.weight")


def _is_resizable(options: ModelOptions, model: VisionTransformer) -> bool:
    height, width = images_of(model).size
    is_given = "img_size" in parse_model_kwargs(options.model_kwargs) or options.input_size is not None
    is_saved = options.model_path is not None and artifact.is_artifact(options.model_path)
    in_units = any(block.unrolled for block in family_of(model).blocks(model))  # sides have to be multiples of a mask unit
    return height == width and not is_given and not is_saved and not in_units


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else available_memory()
