"""Models of transformers and torchvision, saved as their libraries save them, answer in timm's as they do in their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from p3b.storage.load_report import LoadReport
from p3b.storage.models import build_model
from tiny import images

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 48}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
CLASSES = 4


def shaken(model: nn.Module) -> nn.Module:
    """Every parameter away from its initial value, so that none can be lost unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def opened(path: Path, name: str = "vit_tiny_patch16_224", **more: Any) -> tuple[VisionTransformer, LoadReport]:
    model, report = build_model(name, num_classes=CLASSES, model_kwargs={**TIMM, **more}, weights=path, seed=0)
    assert isinstance(model, VisionTransformer) and report is not None
    return model.eval(), report


def text(**more: Any) -> dict[str, Any]:
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48, "vocab_size": 10}
    return {**shape, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **more}


def vit(t: Any) -> nn.Module:
    return t.ViTForImageClassification(t.ViTConfig(**SHAPE, **MLP, num_labels=CLASSES))


def deit(t: Any) -> nn.Module:
    return t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**SHAPE, **MLP, num_labels=CLASSES))


def dinov2(t: Any) -> nn.Module:
    return t.Dinov2Model(t.Dinov2Config(**SHAPE, mlp_ratio=2))


def registers(t: Any) -> nn.Module:
    return t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2))


def mae(t: Any) -> nn.Module:
    return t.ViTMAEForPreTraining(
        t.ViTMAEConfig(**SHAPE, **MLP, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=3)
    )


def siglip(t: Any) -> nn.Module:
    return t.SiglipModel(t.SiglipConfig(vision_config={**SHAPE, **MLP}, text_config=text(projection_size=24)))


def clip(t: Any) -> nn.Module:
    return t.CLIPModel(t.CLIPConfig(vision_config={**SHAPE, **MLP}, text_config=text(), projection_dim=CLASSES))


def features(model: Any, pixels: Tensor) -> Tensor:
    """Normalised tokens of the last layer, as `forward_features` of timm gives them."""
    inner = next((getattr(model, name) for name in ("vit", "deit", "vision_model") if hasattr(model, name)), model)
    hidden = inner(pixels).last_hidden_state
    return inner.post_layernorm(hidden) if "CLIP" in type(model).__name__ else hidden


FAMILIES: list[tuple[Callable[[Any], nn.Module], str, dict[str, Any]]] = [
    (vit, "vit_tiny_patch16_224", {}),
    (deit, "deit_tiny_distilled_patch16_224", {}),
    (dinov2, "vit_small_patch14_dinov2", {}),
    (registers, "vit_small_patch14_reg4_dinov2", {}),
    (siglip, "vit_base_patch16_siglip_224", {}),
    (clip, "vit_base_patch16_clip_224", {}),
]


@pytest.fixture(scope="module")
def transformers() -> Any:
    library = pytest.importorskip("transformers", reason="pip install transformers to compare with its models")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@pytest.mark.parametrize(("build", "name", "more"), FAMILIES, ids=lambda value: getattr(value, "__name__", None))
@pytest.mark.parametrize("style", ["folder", "state dict"])
def test_a_folder_and_a_state_dict_give_the_same_features(
    build: Callable[[Any], nn.Module], name: str, more: dict[str, Any], style: str, transformers: Any, tmp_path: Path
) -> None:
    source = shaken(build(transformers))
    if style == "folder":
        source.save_pretrained(tmp_path)
        path, given = tmp_path, more
    else:  # nothing beside it says which activation and epsilon were trained with: they are given
        path = tmp_path / "w.pth"
        torch.save({"model": {f"module.{key}": value for key, value in source.state_dict().items()}}, path)
        given = more | {"act_layer": {"siglip": "gelu_tanh", "clip": "quick_gelu"}.get(build.__name__, "gelu")}
    model, report = opened(path, name, **given)
    if style != "folder":
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = {"vit": 1e-12, "deit": 1e-12}.get(build.__name__, module.eps)
    pixels = images()
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(pixels), features(source, pixels), rtol=0, atol=1e-5)
    assert any("Hugging Face" in line for line in report.lines())
    assert report.replaced == report.resampled == ()


@pytest.mark.parametrize(("build", "name"), [(vit, "vit_tiny_patch16_224"), (deit, "deit_tiny_distilled_patch16_224")])
def test_a_classifier_comes_along(build: Callable[[Any], nn.Module], name: str, transformers: Any, tmp_path: Path) -> None:
    source = shaken(build(transformers))
    source.save_pretrained(tmp_path)
    model, report = opened(tmp_path, name)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), source(images()).logits, rtol=0, atol=1e-5)
    assert report.missing == ()


def test_a_projection_of_the_size_of_the_classes_is_no_classifier(transformers: Any, tmp_path: Path) -> None:
    shaken(clip(transformers)).save_pretrained(tmp_path)
    _, report = opened(tmp_path, "vit_base_patch16_clip_224")
    assert set(report.missing) == {"head.weight", "head.bias"}
    assert any("act_layer=quick_gelu, as config.json says" in line for line in report.lines())


def test_an_attention_pool_comes_along(transformers: Any, tmp_path: Path) -> None:
    source = shaken(siglip(transformers))
    source.save_pretrained(tmp_path)
    model, _ = opened(tmp_path, "vit_base_patch16_siglip_224")
    with torch.no_grad():
        theirs = source.vision_model(images()).pooler_output
        ours = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_encoder_of_a_masked_autoencoder_is_taken_and_its_decoder_named(transformers: Any, tmp_path: Path) -> None:
    source = shaken(mae(transformers))
    source.save_pretrained(tmp_path)
    model, report = opened(tmp_path)
    parts = source.state_dict()
    assert torch.equal(model.pos_embed, parts["vit.embeddings.position_embeddings"])
    assert torch.equal(model.norm.weight, parts["vit.layernorm.weight"])
    assert any(line.startswith("unexpected decoder.*") for line in report.lines())


@pytest.mark.parametrize("style", ["pytorch_model.bin", "sharded", "file"])
def test_a_folder_is_read_however_its_weights_lie(style: str, transformers: Any, tmp_path: Path) -> None:
    source = shaken(vit(transformers))
    source.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if style == "sharded" else {}))
    path = tmp_path
    if style == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(source.state_dict(), tmp_path / style)
    elif style == "file":
        path = tmp_path / "model.safetensors"
    else:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, _ = opened(path)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), source(images()).logits, rtol=0, atol=1e-5)


def test_torchvision_s_model_gives_the_same_logits(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer as Theirs

    source = shaken(Theirs(32, 8, 2, 3, 24, 48, num_classes=CLASSES))
    torch.save(source.state_dict(), tmp_path / "vit_b_16-c867db91.pth")
    model, report = opened(tmp_path / "vit_b_16-c867db91.pth")
    with torch.no_grad():
        torch.testing.assert_close(model(images()), source(images()), rtol=0, atol=1e-5)
    assert report.unexpected == report.missing == ()
