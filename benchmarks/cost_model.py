"""What pruning costs, on paper: multiply-accumulates, memory traffic, memory and bytes between processes, from shapes alone.

S images of a batch (of one process), G patches, N tokens, D width, K channels of a head, C classes, L layers (depth),
B = 2 L blocks, P = B + 1 places x_0 .. x_B of the residual stream.

Products are counted exactly. They are those of torch's FlopCounterMode, except that it counts the weight gradient of a
grouped convolution as if the convolution were dense. Parameters, states and what is reduced are exact. What autograd keeps
agrees within 0.5 percent; calls of operators, counted on small models, within 5 percent. Memory traffic is a count of the
passes that the code makes over its tensors, good to some tens of percent.
Time is a sum: multiply-accumulates, bytes and operators, each times a rate (`Rates`); nothing hides behind anything else.

Source of the shapes: `p3b.scoring` (probes, batched, trained, ridge), `p3b.vit.gates`, `p3b.scoring.criteria`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import torch

from p3b.scoring import batched
from p3b.scoring.estimators import LOW_RANK
from p3b.scoring.ridge import SOLVE_EVERY
from p3b.vit import products

ESTIMATED = ("linear", "ridge", "low_rank", "paper")
"""Estimators of benefit that the model knows."""

FLOAT, DOUBLE = 4, 8
"""Bytes of a number."""
ADAMW = 28
"""Bytes that AdamW moves for a parameter: it reads value, gradient and two moments, and writes all but the gradient."""
REFILLED = 1
"""Calls of an operator for a product that is computed again, beside one for each of its gates."""
TRAINED = 4 * FLOAT
"""Bytes that a parameter in training holds: value, gradient, two moments."""
LAYER_PASSES = 41
"""Passes over (S, N, D) in the forward pass of a layer: two norms 4, qkv 4, attention 4, projection 2, two residual sums with
drop path 10, MLP 17. The backward pass makes twice as many."""
CONVOLVED_PASSES = 39
"""Passes over (S, G, D) of a patch probe: 13 forward (two convolutions, batch norms that look twice, activations, one mean)."""
NARROWING_PASSES = 5
"""Passes over (P, S, G, D) of the 1x1 convolution of low-rank probes, beyond the first read: one to write all features into one
tensor, two for the products of inputs and outputs, and two for the gradients of their weights."""
TRAINED_LOGIT_PASSES, RIDGE_LOGIT_PASSES = 8, 26
"""Passes over (S, C): scores, their loss and its gradient; with ridge also the curvature by the factor."""


@dataclass(frozen=True)
class Size:
    """A Vision Transformer with one class token, an MLP of four times the width and biases everywhere, and its batch.

    Attributes:
        grid: patches along a side of the square image.
        patch: pixels along a side of a patch.
        batch: images of a batch in one process.
        fused: attention keeps no scores and works them out again in the backward pass.
        feature_bytes: of a number in the features: 4, or 2 under bf16.
    """

    depth: int
    width: int
    heads: int
    grid: int
    patch: int
    classes: int
    batch: int
    fused: bool = True
    feature_bytes: int = FLOAT

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def tokens(self) -> int:
        return self.patches + 1

    @property
    def blocks(self) -> int:
        return 2 * self.depth

    @property
    def places(self) -> int:
        return self.blocks + 1

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        D = self.width
        outside = 3 * self.patch**2 * D + D + D + self.tokens * D + 2 * D + self.head
        return outside + self.depth * (12 * D**2 + 13 * D)

    @property
    def head(self) -> int:
        """Parameters of a linear layer from features to classes."""
        return self.width * self.classes + self.classes

    def rank(self, estimator: str) -> int:
        """Channels K that the convolutions of a patch probe work with: D as published."""
        return max(1, min(LOW_RANK, self.width // 4)) if estimator == "low_rank" else self.width

    def probe_parameters(self, K: int) -> int:
        """Parameters of the probes with convolutions of K channels, class-token probes included."""
        narrowing = 0 if self.width == K else self.width * K
        return self.blocks * (self.head + narrowing + 18 * K**2 + 4 * K + K * self.classes + self.classes)

    @property
    def freed(self) -> list[tuple[int, int]]:
        """(numbers, gates) of those weights of a layer whose products are computed again in the backward pass."""
        D = self.width
        weights = [(3 * D**2, 2), (D**2, 1), (4 * D**2, 1), (4 * D**2, 2)]  # qkv, projection, fc1, fc2
        return [each for each in weights if each[0] >= products.FREED_FROM and self.feature_bytes == FLOAT]

    @property
    def elements(self) -> int:
        """Elements of all gates."""
        return self.depth * (8 * self.width + self.head_width)


@dataclass(frozen=True)
class Work:
    """What is to be done in one step; averages over steps that differ may be fractions.

    Attributes:
        macs: multiply-accumulates of matrix products and convolutions, in the precision of the features.
        macs64: those in float64.
        solve64: those of Cholesky factors and solutions, in float64.
        traffic: bytes read and written.
        operators: calls of an operator of torch.
    """

    macs: float = 0
    macs64: float = 0
    solve64: float = 0
    traffic: float = 0
    operators: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Work)))


def plain(size: Size) -> Work:
    """A step of plain training: forward, backward, AdamW."""
    S, N, D, L = size.batch, size.tokens, size.width, size.depth
    embedding = S * size.patches * 3 * size.patch**2 * D
    linear = S * N * 12 * D**2 * L + S * D * size.classes
    attention = S * N**2 * D * L  # one of two products
    products = 2 * embedding + 3 * linear + (7 if size.fused else 6) * attention  # images need no gradient
    layers = 3 * LAYER_PASSES * S * N * D * L * size.feature_bytes
    return Work(
        macs=products,
        traffic=layers + size.parameters * (3 * FLOAT + ADAMW) + TRAINED_LOGIT_PASSES * S * size.classes * FLOAT,
        operators=116 + 223 * L,
    )


def gates(size: Size) -> Work:
    """What a pruning step adds by itself: gated weights forward and backward, scores of all elements, a look at gradients."""
    D = size.width
    multiplied = size.depth * (18 * D**2 + 5 * D)  # two gates on qkv and fc2, one on proj and fc1
    weights = size.depth * (12 * D**2 + 5 * D)
    again = size.depth * sum(numbers * gates for numbers, gates in size.freed)
    traffic = (2 * multiplied + again) * 2 * FLOAT + weights * 3 * FLOAT + multiplied * FLOAT + size.parameters * FLOAT
    return Work(traffic=traffic, operators=27 + size.depth * (73 + sum(REFILLED + gates for _, gates in size.freed)))


def bytes_of_block(estimator: str, size: Size) -> int:
    """Estimate, by `p3b.scoring.batched`, of what a block's probes hold; it decides how many blocks are evaluated together.

    Args:
        estimator: "linear" or "low_rank".
    """
    D, C, K = size.width, size.classes, size.rank(estimator)
    if estimator == "linear":
        return 4 * size.batch * size.feature_bytes * (2 * D + 3 * C) + 2 * FLOAT * 2 * size.head
    gradients = 2 * FLOAT * size.probe_parameters(K) // size.blocks
    return size.batch * size.feature_bytes * (size.tokens * (D + 16 * K) + 12 * C) + gradients


def blocks_at_once(estimator: str, size: Size, ranks: int = 1) -> int:
    """Blocks whose graphs of probes are held at the same time; with the paper's probes in one process, one."""
    if ranks > 1:
        return size.blocks
    return 1 if estimator == "paper" else batched.blocks_at_once(size.blocks, bytes_of_block(estimator, size))


def probes(estimator: str, size: Size, ranks: int = 1) -> Work:
    """What an estimator of benefit adds to a step, its probes' own learning included; ridge's solution by its share.

    Args:
        estimator: of `ESTIMATED`.
        ranks: processes; where there are several, ridge makes a step's moments apart before it adds them.
    """
    S, N, G, D, C, B, P = size.batch, size.tokens, size.patches, size.width, size.classes, size.blocks, size.places
    scored = S * D * C  # a linear probe on one kind of token at one place
    reading = Work(traffic=P * S * N * D * size.feature_bytes)
    if estimator == "ridge":
        moments = 2 * P * (D**2 + D * C + D)
        weights = 2 * B * (D * C + C)
        observed = Work(
            macs=4 * B * scored,
            macs64=2 * P * S * D * (D + C),
            traffic=4 * B * RIDGE_LOGIT_PASSES * S * C * FLOAT
            + 2 * weights * FLOAT
            + (2 if ranks == 1 else 6) * moments * DOUBLE,
            operators=82 + 135 * B,
        )
        solved = Work(
            solve64=2 * B * (D**3 / 6 + D**2 * C) / SOLVE_EVERY,
            traffic=2 * B * (10 * D**2 + 20 * D * C) * DOUBLE / SOLVE_EVERY,
            operators=2 * B * 66 / SOLVE_EVERY,
        )
        return reading + observed + solved
    heads = 2 * B * size.head
    logits = 4 * B * TRAINED_LOGIT_PASSES * S * C * FLOAT
    learned = 6 * FLOAT + ADAMW  # two uses forward and backward, gradients added up and looked at, AdamW
    chunks = -(-B // blocks_at_once(estimator, size, ranks))
    if estimator == "linear":
        return reading + Work(macs=8 * B * scored, traffic=logits + heads * learned, operators=58 + 101 * chunks + 4 * B)
    K = size.rank(estimator)
    # Features need no gradient: that of the first convolution is its weight's alone, and with a low rank it is the narrow one.
    convolutions = 5 * 9 * D**2 if K == D else 2 * D * K + 6 * 9 * K**2
    patches = 2 * B * (S * G * convolutions + 3 * S * K * C)
    convolved = 2 * B * CONVOLVED_PASSES * S * G * K * size.feature_bytes
    narrowed = 0 if K == D else NARROWING_PASSES * P * S * G * D * size.feature_bytes
    return reading + Work(
        macs=4 * B * scored + patches,
        traffic=logits + size.probe_parameters(K) * learned + convolved + narrowed,
        operators=49 + 167 * B if K == D else 79 + 262 * chunks + 3 * B,
    )


def update(size: Size) -> Work:
    """A mask update: sorting and a handful of passes over the elements. What it comes to is operators."""
    return Work(traffic=size.elements * 40 * DOUBLE, operators=160 + 61 * size.depth)


def memory_plain(size: Size) -> int:
    """Bytes of a plain step: parameters with gradients and moments, and what autograd keeps for the backward pass."""
    S, N, D, L = size.batch, size.tokens, size.width, size.depth
    layer = S * N * (16 * D + size.heads + 4)  # attention's sums by head, two statistics of each of two norms
    outside = S * 3 * (size.patch * size.grid) ** 2 + S * N * (2 * D + 2) + S * size.classes  # images, last norm, scores
    return size.parameters * TRAINED + (L * layer + outside) * size.feature_bytes


def memory_gates(size: Size) -> int:
    """Bytes that the gated weights take beside the weights: autograd keeps products and the masks along their axes.

    Of the large ones there is one at a time. Under bf16 that goes for all: a copy in half precision is kept, as in plain
    training.
    """
    D = size.width
    freed = 12 * D**2 if size.feature_bytes < FLOAT else sum(numbers for numbers, _ in size.freed)
    at_a_time = 4 * D**2 if freed else 0
    return (size.depth * (12 * D**2 - freed + 3 * D) + size.elements + at_a_time) * FLOAT


@dataclass(frozen=True)
class Memory:
    """Bytes that an estimator takes beside the step: what stays from step to step, and what comes and goes within one."""

    held: int
    passing: int

    @property
    def total(self) -> int:
        return self.held + self.passing


def memory_probes(estimator: str, size: Size, ranks: int = 1) -> Memory:
    """What an estimator of benefit holds.

    Args:
        estimator: of `ESTIMATED`. Of the trained ones `held` are their parameters with gradients and moments, `passing` is what
            autograd keeps at most (see `blocks_at_once`); of ridge `held` are moments and probes,
            `passing` tokens and targets of one step, and its moments where there are several processes.
        ranks: processes.
    """
    S, G, D, C, B, P = size.batch, size.patches, size.width, size.classes, size.blocks, size.places
    if estimator == "ridge":
        moments = (2 * P * (D**2 + D * C + D) + C) * DOUBLE
        held = moments + 2 * B * (D * C + C) * FLOAT + C * FLOAT + (1 + 2 * B) * DOUBLE
        return Memory(held=held, passing=(2 * P * S * D + S * C) * FLOAT + (moments if ranks > 1 else 0))
    K, b = size.rank(estimator), blocks_at_once(estimator, size, ranks)
    side = 2 * b  # inputs and outputs
    scored = (1 if estimator == "paper" and ranks == 1 else 2) * side * S * C * FLOAT  # else class token and patches together
    if estimator == "linear":
        tokens = 2 * (b + 1) * S * D * size.feature_bytes
        return Memory(held=2 * B * size.head * TRAINED, passing=scored + tokens)
    maps = 4 if K == D else 5  # in and out of both norms; with a low rank what the narrowing convolution gives
    statistics = 2 * FLOAT if ranks == 1 else 5 * DOUBLE + FLOAT  # of a channel of a norm; in float64 over several ranks
    convolved = side * (S * G * K * maps * size.feature_bytes + 2 * K * statistics + S * K * FLOAT)  # two norms, the mean
    copied = 0 if K == D else (b + 1) * S * (G + 1) * D * size.feature_bytes  # patches and class tokens side by side
    return Memory(held=size.probe_parameters(K) * TRAINED, passing=convolved + copied + scored)


@dataclass(frozen=True)
class Wire:
    """Bytes that each process hands over to be averaged: of a step, and of a mask update."""

    step: int
    update: int

    @staticmethod
    def sent(payload: float, ranks: int) -> float:
        """Bytes that each process sends when so many are averaged around a ring."""
        return payload * 2 * (ranks - 1) / ranks


def wire_gradients(size: Size) -> int:
    """Bytes of the model's own gradients, which plain training averages too."""
    return size.parameters * FLOAT


def wire(estimator: str | None, size: Size) -> Wire:
    """What pruning adds; the digest of the masks (64 characters at an update) and the wish to stop (4 bytes a step) left out.

    Args:
        estimator: of `ESTIMATED`, or None: keep ratios are given and nothing is probed.
    """
    D, C, B, P = size.width, size.classes, size.blocks, size.places
    asked, benefits, scores = FLOAT, 2 * B * FLOAT, size.elements * FLOAT
    own = {
        None: 0,
        "linear": 2 * B * size.head * FLOAT,
        **{
            name: size.probe_parameters(K) * FLOAT + 4 * 2 * B * 2 * K * DOUBLE
            for name, K in ((name, size.rank(name)) for name in ("low_rank", "paper"))
        },
        "ridge": (2 * P * (D**2 + D * C + D) + C + 2 * 2 * B) * DOUBLE,
    }[estimator]
    return Wire(step=asked + own + (benefits if estimator else 0), update=scores)


@dataclass(frozen=True)
class Rates:
    """How long each kind of work takes, in seconds: a multiply-accumulate, one in float64, a byte, an operator."""

    mac: float
    mac64: float
    byte: float
    operator: float

    def seconds(self, work: Work) -> float:
        return (
            work.macs * self.mac
            + (work.macs64 + work.solve64) * self.mac64
            + work.traffic * self.byte
            + work.operators * self.operator
        )


def fit(steps: Sequence[tuple[Work, float]]) -> Rates:
    """Rates that explain the seconds of plain steps best, in squares of relative errors; none below zero.

    A product in float64 is taken to cost two in float32, as on a CPU's vector units.
    """
    rows = torch.tensor([[w.macs, w.traffic, w.operators] for w, _ in steps], dtype=torch.float64)
    rows = rows / torch.tensor([seconds for _, seconds in steps], dtype=torch.float64)[:, None]
    scale = rows.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    ones = torch.ones(len(steps), 1, dtype=torch.float64)
    best, least = torch.zeros(3, dtype=torch.float64), torch.inf
    for count in range(1, min(3, len(steps)) + 1):  # so few unknowns: which of them are above zero is tried out
        for chosen in combinations(range(3), count):
            columns = (rows / scale)[:, chosen]
            found = torch.linalg.lstsq(columns, ones).solution
            error = float((columns @ found - ones).square().sum())
            if (found >= 0).all() and error < least:
                least, best = error, torch.zeros(3, dtype=torch.float64).index_put_((torch.tensor(chosen),), found[:, 0])
    mac, byte, operator = (best / scale).tolist()
    return Rates(mac, 2 * mac, byte, operator)
