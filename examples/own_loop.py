"""Prune a ViT in your own training loop: the five lines that P3B adds are marked.

python examples/own_loop.py            # scikit-learn's handwritten digits, no download; pip install 'p3b[demo]'
"""

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import p3b


def digits(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """1797 scans of 8x8 pixels as RGB images in [-1, 1], and their labels."""
    scans, labels = load_digits(return_X_y=True)
    images = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 8 - 1
    return images.to(device), torch.tensor(labels, device=device)


def main(steps: int, prune_ratio: float, out: str) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, targets = digits(device)
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

    schedule = p3b.Schedule(start=steps // 4, sparse=steps // 2, final=steps, update_every=max(1, steps // 40))
    pruner = p3b.Pruner(model, prune_ratio=prune_ratio, schedule=schedule)  # 1

    model.train()
    while not pruner.done:
        batch = torch.randint(len(images), (64,), device=device)
        loss = cross_entropy(model(images[batch]), targets[batch])
        loss = loss + pruner.loss(cross_entropy, targets[batch])  # 2: the probes learn beside the model
        loss.backward()
        pruner.step()  # 3: gradients exist, weights have not moved yet
        optimizer.step()
        optimizer.zero_grad()

    dense_params = pruner.layout.other_params + sum(b.numel() for n, b in model.named_parameters() if n.startswith("blocks."))
    model = pruner.finalize()  # 4: an ordinary module, small; fine-tune it with a new optimizer
    p3b.save(model, out, class_names=[str(digit) for digit in range(10)])  # 5: config.json and model.safetensors

    model.eval()
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == targets).float().mean().item()
    print(f"{p3b.count_parameters(model):,} of {dense_params:,} parameters, accuracy on the training images {accuracy:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--prune-ratio", type=float, default=0.5)
    parser.add_argument("--out", default="own-loop-model")
    given = parser.parse_args()
    main(given.steps, given.prune_ratio, given.out)
