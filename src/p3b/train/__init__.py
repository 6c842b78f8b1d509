"""The training loop and what it stands on: optimizers, evaluation, checkpoints, processes."""
