"""Models of transformers in memory answer in timm's as they do in their own, and can be pruned; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.data
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import p3b
from p3b.errors import ModelError
from tiny import images, tiny_vit

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 40}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "vocab_size": 10,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DECODER = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 3}
Build = Callable[[Any], Any]

ANSWERS: dict[str, tuple[Build, Callable[[Any, Tensor], Tensor]]] = {
    "ViT": (
        lambda t: t.ViTForImageClassification(t.ViTConfig(**SHAPE, **MLP, num_labels=4)),
        lambda model, pixels: model(pixels).logits,
    ),
    "ViT without bias and classifier": (
        lambda t: t.ViTModel(t.ViTConfig(**SHAPE, **MLP, qkv_bias=False, layer_norm_eps=1e-3)),
        lambda model, pixels: model(pixels).last_hidden_state[:, 0],
    ),
    "DeiT": (
        lambda t: t.DeiTForImageClassification(t.DeiTConfig(**SHAPE, **MLP, num_labels=4)),
        lambda model, pixels: model(pixels).logits,
    ),
    "DeiT with its teacher": (
        lambda t: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**SHAPE, **MLP, num_labels=4)),
        lambda model, pixels: model(pixels).logits,
    ),
    "DeiT without classifier": (
        lambda t: t.DeiTModel(t.DeiTConfig(**SHAPE, **MLP)),
        lambda model, pixels: model(pixels).last_hidden_state[:, :2].mean(1),
    ),
    "DINOv2": (
        lambda t: t.Dinov2Model(t.Dinov2Config(**SHAPE, mlp_ratio=2)),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "DINOv2 with registers": (
        lambda t: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2)),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "SigLIP": (
        lambda t: t.SiglipModel(t.SiglipConfig(vision_config={**SHAPE, **MLP}, text_config={**TEXT, "projection_size": 24})),
        lambda model, pixels: model.vision_model(pixels).pooler_output,
    ),
    "SigLIP's tower": (
        lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**SHAPE, **MLP)),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "SigLIP's tower without pooling": (
        lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**SHAPE, **MLP, vision_use_head=False)),
        lambda model, pixels: model(pixels).last_hidden_state.mean(1),
    ),
    "CLIP": (
        lambda t: t.CLIPModel(t.CLIPConfig(vision_config={**SHAPE, **MLP}, text_config=TEXT, projection_dim=4)),
        lambda model, pixels: model.vision_model(pixels).pooler_output,
    ),
    "CLIP's tower with GELU": (
        lambda t: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**SHAPE, **MLP, hidden_act="gelu")),
        lambda model, pixels: model.vision_model(pixels).pooler_output,
    ),
    "CLIP's tower alone": (
        lambda t: t.CLIPVisionModel(t.CLIPVisionConfig(**SHAPE, **MLP)),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "ViTMAE's encoder": (
        lambda t: t.ViTMAEModel(t.ViTMAEConfig(**SHAPE, **MLP, mask_ratio=0.0)),
        lambda model, pixels: model(pixels, noise=torch.arange(16.0).expand(len(pixels), -1)).last_hidden_state[:, 0],
    ),
    "ViTMAE": (
        lambda t: t.ViTMAEForPreTraining(t.ViTMAEConfig(**SHAPE, **MLP, **DECODER, mask_ratio=0.0)),
        # The noise is what patches are shuffled by: ascending, it leaves them as they are.
        lambda model, pixels: model.vit(pixels, noise=torch.arange(16.0).expand(len(pixels), -1)).last_hidden_state[:, 0],
    ),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    library = pytest.importorskip("transformers", reason="pip install transformers to compare with its models")
    library.logging.set_verbosity_error()
    return library


def shaken(model: nn.Module) -> Any:
    """Every parameter away from its initial value, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", ANSWERS)
def test_it_answers_as_its_source_does_and_can_be_pruned(name: str, transformers: Any) -> None:
    build, answer = ANSWERS[name]
    source = shaken(build(transformers))
    model = p3b.from_transformers(source)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), answer(source, images()), rtol=0, atol=1e-5)
    assert not model.training
    p3b.Pruner(model, 0.3, "magnitude", p3b.Schedule(start=0, sparse=1, final=2, update_every=1)).detach()


def test_all_tokens_are_the_source_s_not_the_class_token_alone(transformers: Any) -> None:
    for name in ("DeiT", "DINOv2 with registers"):
        source = shaken(ANSWERS[name][0](transformers))
        theirs = getattr(source, "deit", source)(images()).last_hidden_state
        torch.testing.assert_close(p3b.from_transformers(source).forward_features(images()), theirs, rtol=0, atol=1e-5)


def test_weights_are_copies_in_the_dtype_and_mode_of_the_source(transformers: Any) -> None:
    source = shaken(ANSWERS["ViT"][0](transformers)).train().bfloat16()
    model = p3b.from_transformers(source)
    assert model.training and model.cls_token.dtype is torch.bfloat16
    with torch.no_grad():
        before = model.cls_token.clone()
        for parameter in source.parameters():
            parameter.zero_()
    assert torch.equal(model.cls_token, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_image_processor_says_how_images_are_prepared(transformers: Any) -> None:
    processor = transformers.CLIPImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2, size={"shortest_edge": 256}, crop_size=224
    )
    model = p3b.from_transformers(ANSWERS["ViT"][0](transformers), processor)
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == (0.1, 0.2, 0.3) and config["std"] == (0.4, 0.5, 0.6)
    assert config["input_size"] == (3, 32, 32) and config["interpolation"] == "bilinear"
    assert config["crop_pct"] == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda t: t.Dinov2ForImageClassification(t.Dinov2Config(**SHAPE, mlp_ratio=2)), r"model\.dinov2"),
        (lambda t: t.Dinov2Model(t.Dinov2Config(**SHAPE, use_swiglu_ffn=True)), "gated MLP"),
        (lambda t: t.ViTModel(t.ViTConfig(**SHAPE, **MLP, hidden_act="laplace")), "activation 'laplace'"),
        (lambda t: t.SiglipForImageClassification(t.SiglipConfig(vision_config={**SHAPE, **MLP})), r"model\.vision_model"),
        (lambda t: t.BeitModel(t.BeitConfig(**SHAPE, **MLP)), "Unknown model_type 'beit'"),
        (lambda t: t.CLIPTextModel(t.CLIPTextConfig(**TEXT)), "model_type 'clip_text_model'"),
    ],
)
def test_what_timm_s_model_does_not_compute_is_refused(build: Build, word: str, transformers: Any) -> None:
    with pytest.raises(ModelError, match=word):
        p3b.from_transformers(build(transformers))


def test_a_part_that_was_put_in_is_refused(transformers: Any) -> None:
    source = ANSWERS["ViT"][0](transformers)
    next(layer for layer in source.modules() if isinstance(layer, nn.LayerNorm)).extra = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match=r"no place for: blocks\.0\.\w+\.extra"):
        p3b.from_transformers(source)


def test_what_is_not_of_transformers_is_refused() -> None:
    for other in (tiny_vit(), nn.Linear(2, 2), "google/vit-base-patch16-224"):
        with pytest.raises(ModelError, match="takes a model of the transformers library"):
            p3b.from_transformers(other)  # type: ignore[arg-type]


def test_it_is_timm_s_own_class(transformers: Any) -> None:
    assert type(p3b.from_transformers(ANSWERS["ViT"][0](transformers))) is VisionTransformer
