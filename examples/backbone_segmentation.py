"""Prune the backbone of a network that segments drawn shapes: python examples/backbone_segmentation.py [steps]"""

import sys

import timm
import torch
from torch import Tensor, nn

import p3b

SIDE, SHAPE = 32, {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}


def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 32, 32) of a disc or a square on noise, and (count, 32, 32) masks: 0 ground, 1 disc, 2 square."""
    places, kind = torch.arange(SIDE), torch.randint(2, (count, 1, 1))
    centres, radius = torch.randint(8, SIDE - 8, (2, count, 1, 1)), torch.randint(4, 9, (count, 1, 1))
    high, wide = (places[:, None] - centres[0]).abs(), (places - centres[1]).abs()
    inside = torch.where(kind == 0, high**2 + wide**2 <= radius**2, torch.maximum(high, wide) <= radius)
    return 0.5 * torch.randn(count, 3, SIDE, SIDE) + inside[:, None].float(), inside * (kind + 1)


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SHAPE)
        self.head = nn.Conv2d(SHAPE["embed_dim"], 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0])


def criterion(answers: Tensor, masks: Tensor) -> Tensor:
    answers = nn.functional.interpolate(answers, size=masks.shape[-2:])  # (S, 3, H, W), of the head or of a probe
    return nn.functional.cross_entropy(answers, masks)


def main(steps: int) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW((network := Segmenter()).parameters(), lr=1e-3)
    schedule = p3b.Schedule(start=steps // 4, sparse=steps // 2, final=steps, update_every=max(1, steps // 20))
    pruner = p3b.Pruner(network.backbone, 0.5, schedule=schedule, estimator="places", probe_outputs=3)
    dense = p3b.count_parameters(network.backbone)
    while not pruner.done:
        images, masks = drawn(32)
        optimizer.zero_grad()
        (criterion(network(images), masks) + pruner.loss(criterion, masks)).backward()
        pruner.step()
        optimizer.step()
    pruner.decide_last()  # hard masks; then the same network, small
    with torch.no_grad():
        masked = network.eval()(images)
        pruner.shrink()
        small = network(images)
    kept, difference = p3b.count_parameters(network.backbone), (small - masked).abs().max()
    print(f"{kept:,} of {dense:,} parameters, loss {criterion(small, masks):.2f}, small and masked differ by {difference:.0e}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
