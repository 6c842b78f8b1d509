"""timm's entry point for models that p3b saved: `timm.create_model("local-dir:run/pruned", pretrained=True)`.

timm looks a folder's architecture up in its registry and has no place where a package could announce one of its own, so ours
has to be registered once timm is there: `import p3b` does it where timm has been imported, and otherwise asks Python to do it
right after `import timm` (`p3b.__init__`). The registry is reached by `timm.models.register_model` alone.

What is built is what `p3b.load` builds, from the same files with the same checks. As everywhere in timm, `pretrained=False`
gives the network with fresh weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

__all__ = ["p3b_vit"]


@register_model
def p3b_vit(
    pretrained: bool = False,
    pretrained_cfg: Mapping[str, Any] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **arguments: Any,
) -> VisionTransformer:
    """A model that p3b saved, in training mode, from a folder ("local-dir:...") or from the hub ("hf-hub:...").

    Args:
        pretrained: with its weights; else with fresh ones.
        pretrained_cfg: of timm, which says where the model lies.
        pretrained_cfg_overlay: of timm: entries that replace those of `pretrained_cfg`.
        cache_dir: of the hub.
        arguments: `num_classes` (another number gets a new head) and `drop_path_rate` may change the model; others may repeat
            what it is.

    Raises:
        ModelError: it is not said where the model lies, or an argument contradicts it.
        WeightsError: the files cannot be had, or are damaged.
    """
    # Registering must not load what itself imports timm.
    from p3b.deploy.hub import fetch
    from p3b.errors import ModelError
    from p3b.storage.models import open_saved

    cfg = resolve_pretrained_cfg("p3b_vit", dict(pretrained_cfg or {}), dict(pretrained_cfg_overlay or {}))
    if cfg.hf_hub_id:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        folder = fetch(repo, revision or None, cache_dir)
    elif cfg.file:
        folder = Path(cfg.file)
    else:
        raise ModelError(
            "p3b_vit stands for any model that p3b saved: name one, as in timm.create_model('local-dir:run/pruned', "
            "pretrained=True) or 'hf-hub:user/name'."
        )
    model = open_saved(folder, arguments, fresh=not pretrained)
    model.pretrained_cfg = model.default_cfg = cfg.to_dict()
    return model
