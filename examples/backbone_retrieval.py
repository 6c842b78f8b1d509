"""Prune a network that embeds drawn images for retrieval, no classifier: python examples/backbone_retrieval.py [steps]"""

import sys

import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import p3b

SIDE, KINDS = 24, 12


def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 24, 24) of coloured stripes under noise, and their kinds: six directions, two widths."""
    kinds = torch.randint(KINDS, (count,))
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    angle, width = (kinds % 6) * torch.pi / 6, torch.where(kinds < 6, 0.6, 1.2)
    along = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    stripes = (width[:, None, None] * along + 6.3 * torch.rand(count, 1, 1)).sin()
    return torch.rand(count, 3, 1, 1) * stripes[:, None] + 0.3 * torch.randn(count, 3, SIDE, SIDE), kinds


def contrastive(embeddings: Tensor, kinds: Tensor) -> Tensor:
    """How far images of one kind (S,) are from each other, against all others; embeddings are (S, any number)."""
    directions = F.normalize(embeddings, dim=1)
    itself = torch.eye(len(kinds), dtype=torch.bool)
    closeness = (directions @ directions.T / 0.2).masked_fill(itself, -1e9).log_softmax(1)
    alike = (kinds[:, None] == kinds) & ~itself
    return -(closeness * alike).sum() / alike.sum().clamp(min=1)


def main(steps: int) -> None:
    torch.manual_seed(0)
    shape = {"img_size": SIDE, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = p3b.Schedule(start=steps // 4, sparse=steps // 2, final=steps, update_every=max(1, steps // 20))
    pruner = p3b.Pruner(model, 0.5, schedule=schedule, probe_outputs=16)  # probes embed into 16 numbers
    dense = p3b.count_parameters(model)
    while not pruner.done:
        images, kinds = drawn(96)
        (contrastive(model(images), kinds) + pruner.loss(contrastive, kinds)).backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()
    pruner.decide_last()  # hard masks; then the same model, small
    images, kinds = drawn(256)
    with torch.no_grad():
        masked = model.eval()(images)
        small = pruner.shrink()(images)
    nearest = torch.cdist(small, small).fill_diagonal_(torch.inf).argmin(1)
    found = (kinds[nearest] == kinds).float().mean()
    said = f"{p3b.count_parameters(model):,} of {dense:,} parameters, {found:.0%} of nearest images are of the same kind"
    print(f"{said}, small and masked differ by {(small - masked).abs().max():.0e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
