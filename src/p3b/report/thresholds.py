"""The numbers that say what is too little to train with: warned of before a run, and named in its diagnosis after it."""

from __future__ import annotations

FEW_STEPS = 500
"""Optimizer steps below which a transfer has hardly begun."""
FEW_STEPS_BETWEEN = 20
"""Steps between two phases below which the model cannot follow."""
FEW_STEPS_BETWEEN_UPDATES, FEW_IMAGES_BETWEEN_UPDATES = 5, 300
"""Between two mask updates: so few steps are too few whatever their batch; so few images are, unless they come in
`FEW_STEPS_BETWEEN` steps or more."""
SMALL_RATE = 1e-4
"""Largest learning rate of AdamW that may be too small for a ViT."""
SHORT_WAY = 0.1
"""Learning rate x steps, about as far as AdamW can move a weight, below which a small rate changes little."""
FEW_IMAGES_A_CLASS = 10
"""Training images below which a class is hardly learned."""
FEWEST_FOR_TOP5 = 6
"""Classes from which on top-5 says anything."""


def is_noise(steps: int, images: int) -> bool:
    """Whether benefits and scores between two mask updates are mostly noise, for so many steps and images in them."""
    if steps < FEW_STEPS_BETWEEN_UPDATES:
        return True
    return steps < FEW_STEPS_BETWEEN and images < FEW_IMAGES_BETWEEN_UPDATES


def hardly_moves(rate: float, steps: int) -> bool:
    """Whether a learning rate is too small to change a model in so many steps."""
    return rate <= SMALL_RATE and rate * steps < SHORT_WAY
