"""How SAViT shares a budget out among kinds of elements: the minimum of a quadratic form on a surface of equal cost.

Three kinds: heads, hidden channels, channels of the residual stream. a, b, c in [0, 1] are the shares of them that go. What a
network costs is a sum of products of the shares that stay,

    cost(a, b, c) = sum over subsets S of the kinds of  p_S * product over k in S of (1 - share_k),

with no product of heads and hidden channels, which share no weight. So at a fixed c the surface cost = budget is a straight
line, u(c) a + v(c) b = w(c), with u, v, w linear in c; on it the form is a quadratic in a, whose minimum over an interval is
known; and the minimum over c lies at an end, where the line meets a corner of the box, or at a root of a polynomial in c.

Source: Zheng et al., "SAViT: Structure-Aware Vision Transformer Pruning via Collaborative Optimization", NeurIPS 2022. Its
authors search a and c by evolution; three numbers need no search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing
from numpy.polynomial import Polynomial

from p3b.errors import BudgetError

Floats = np.typing.NDArray[np.float64]

HEADS, HIDDEN, STREAM = range(3)
_TOLERANCE = 1e-9
"""By which a share may lie outside of its range through rounding, before it is put back."""


@dataclass(frozen=True)
class CostSurface:
    """Cost of a network as a function of what stays of each kind.

    Attributes:
        coefficients: p_S >= 0 by the set of kinds S, as three truth values (heads, hidden, stream).
    """

    coefficients: Mapping[tuple[bool, bool, bool], float]

    def at(self, pruned: Floats) -> float:
        """Cost when the shares `pruned` (3,) of the kinds are gone."""
        kept = 1 - np.asarray(pruned, dtype=np.float64)
        return float(sum(value * kept[list(along)].prod() for along, value in self.coefficients.items()))

    def line(self, budget: float) -> tuple[Polynomial, Polynomial, Polynomial]:
        """u, v, w as polynomials in c: cost = budget where u(c) a + v(c) b = w(c)."""

        def along(heads: bool, hidden: bool) -> Polynomial:
            alone, with_stream = (self.coefficients.get((heads, hidden, stream), 0.0) for stream in (False, True))
            return Polynomial([alone + with_stream, -with_stream])

        u, v = along(heads=True, hidden=False), along(heads=False, hidden=True)
        return u, v, u + v + along(heads=False, hidden=False) - budget


def cheapest_shares(
    interactions: Floats, surface: CostSurface, budget: float, most: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Floats:
    """Shares x = (a, b, c) to prune that minimise x^T H x where cost(x) = budget: the global minimum, to rounding.

    Args:
        interactions: H (3, 3), finite; it need be neither symmetric nor positive.
        surface: what the network costs; heads and hidden channels must cost something where no stream channel is gone.
        budget: cost to meet, > 0, in the units of the surface.
        most: the largest share of each kind that may go, in [0, 1].

    Returns:
        (3,) float64 shares in [0, most].

    Raises:
        BudgetError: no shares within these bounds meet the budget.
    """
    dense, least = surface.at(np.zeros(3)), surface.at(np.array(most))
    if not least - _TOLERANCE * dense <= budget <= dense * (1 + _TOLERANCE):
        raise BudgetError(
            f"Pruning heads, hidden channels and the residual stream can leave {least:,.0f} to {dense:,.0f} parameters; the "
            f"prune ratio asks for {budget:,.0f}. Choose another prune ratio."
        )
    form = (interactions + interactions.T) / 2
    form = form / max(float(np.abs(form).max()), np.finfo(np.float64).tiny)
    u, v, w = (polynomial / dense for polynomial in surface.line(budget))
    places = [0.0, most[STREAM]]
    for polynomial in (*_corners(u, v, w, most), *_stationary(form, u, v, w, most)):
        places += _roots_within(polynomial, most[STREAM])

    def best_at(c: float) -> tuple[float, Floats]:
        shares = _best_on_line(form, float(u(c)), float(v(c)), float(w(c)), c, most)
        return (np.inf, np.zeros(3)) if shares is None else (float(shares @ form @ shares), shares)

    best = min(places, key=lambda c: best_at(c)[0])
    # Roots of a polynomial of degree nine are known to a few digits less than what they are roots of.
    return best_at(_polished(lambda c: best_at(c)[0], best, most[STREAM]))[1]


def _corners(u: Polynomial, v: Polynomial, w: Polynomial, most: tuple[float, float, float]) -> list[Polynomial]:
    """Their roots: where the line passes through a corner of the box of a and b."""
    return [w - u * a - v * b for a in (0.0, most[HEADS]) for b in (0.0, most[HIDDEN])]


def _stationary(
    form: Floats, u: Polynomial, v: Polynomial, w: Polynomial, most: tuple[float, float, float]
) -> list[Polynomial]:
    """Their roots: where the form along a curve of candidates neither rises nor falls with c.

    The curves: a or b at a bound, the other one from the line; and a at the stationary point of the form along the line.
    """
    c = Polynomial([0.0, 1.0])
    (aa, ab, ac), (_, bb, bc), (_, _, cc) = form

    def numerator_of_slope(numerator: Polynomial, denominator: Polynomial) -> Polynomial:
        slope: Polynomial = numerator.deriv() * denominator - numerator * denominator.deriv()
        return slope

    found = []
    for a in (0.0, most[HEADS]):
        b_v = w - u * a  # b times v
        f_vv = aa * a**2 * v**2 + bb * b_v**2 + cc * c**2 * v**2 + 2 * (ab * a * b_v * v + ac * a * c * v**2 + bc * b_v * c * v)
        found.append(numerator_of_slope(f_vv, v**2))
    for b in (0.0, most[HIDDEN]):
        a_u = w - v * b
        f_uu = aa * a_u**2 + bb * b**2 * u**2 + cc * c**2 * u**2 + 2 * (ab * a_u * b * u + ac * a_u * c * u + bc * b * c * u**2)
        found.append(numerator_of_slope(f_uu, u**2))
    # With b = (w - u a) / v the form times v^2 is n2 a^2 + n1 a + n0, at its stationary point n0 - n1^2 / (4 n2).
    n2 = aa * v**2 - 2 * ab * u * v + bb * u**2
    n1 = 2 * (ab * w * v - bb * u * w + ac * c * v**2 - bc * c * u * v)
    n0 = bb * w**2 + cc * c**2 * v**2 + 2 * bc * c * w * v
    found.append(numerator_of_slope(4 * n0 * n2 - n1**2, n2 * v**2))
    return found


def _roots_within(polynomial: Polynomial, high: float) -> list[float]:
    """Real roots in [0, high]; nearly real ones as well, since a candidate too many does no harm."""
    coefficients = np.asarray(polynomial.coef, dtype=np.float64)
    largest = float(np.abs(coefficients).max())
    if largest == 0:
        return []
    # Leading coefficients that are rounding errors would be divided by.
    trimmed = Polynomial(coefficients / largest).trim(1e-13)
    roots = trimmed.roots() if trimmed.degree() else np.empty(0)
    near = roots[np.abs(roots.imag) < 1e-4].real
    return [float(min(max(root, 0.0), high)) for root in near if -1e-6 <= root <= high + 1e-6]


def _polished(value: Callable[[float], float], best: float, high: float) -> float:
    """The best place within 1e-3 of one that is nearly the best, by golden section."""
    low, high, golden = max(0.0, best - 1e-3), min(high, best + 1e-3), (math.sqrt(5) - 1) / 2
    while high - low > 1e-12:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if value(left) <= value(right) else (left, high)
    return min(best, low, high, key=value)


def _best_on_line(form: Floats, u: float, v: float, w: float, c: float, most: tuple[float, float, float]) -> Floats | None:
    """The best shares with this c; None where the line misses the box of a and b."""
    if u <= 0 or v <= 0:
        return None
    low, high = max(0.0, (w - v * most[HIDDEN]) / u), min(most[HEADS], w / u)
    if low > high + _TOLERANCE:
        return None

    def shares(a: float) -> Floats:
        b = (w - u * a) / v
        return np.array([min(max(a, 0.0), most[HEADS]), min(max(b, 0.0), most[HIDDEN]), c])

    candidates = [low, high]
    along, start = np.array([1.0, -u / v, 0.0]), np.array([0.0, w / v, c])
    curvature, slope = float(along @ form @ along), float(along @ form @ start)
    if curvature > 0 and low < -slope / curvature < high:
        candidates.append(-slope / curvature)
    return min(map(shares, candidates), key=lambda x: float(x @ form @ x))
