"""Choose yourself how much of each block stays, and let P3B choose which elements: no probes, no budget.

python examples/keep_ratios_by_hand.py
"""

import timm
import torch
from torch.nn.functional import cross_entropy

import p3b


def main() -> None:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    images, targets = torch.randn(32, 3, 32, 32), torch.randint(4, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # Attention and MLP in turn: the first block whole, a thin second one, a third without its MLP.
    pruner = p3b.Pruner(
        model,
        schedule=p3b.Schedule(start=2, sparse=10, final=20, update_every=2),
        keep_ratios=[1.0, 1.0, 0.5, 0.25, 0.75, 0.0],
    )
    while not pruner.done:
        cross_entropy(model(images), targets).backward()
        pruner.step()
        optimizer.step()
        optimizer.zero_grad()

    decision = pruner.decide_last()
    small = pruner.shrink()
    for block in decision.blocks:
        print(f"{block.name:<14} {block.kept_params:>6,} of {block.params:>6,} parameters ({block.keep_ratio:.0%} asked for)")
    print(f"{p3b.count_parameters(small):,} parameters, {p3b.count_macs(small, 32) / 1e6:.2f} M MACs")


if __name__ == "__main__":
    main()
