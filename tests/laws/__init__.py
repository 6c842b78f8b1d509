"""Laws of the mathematics and of shrinking, to be tried on random shapes, ratios, benefits and scores.

A law is a sentence that a docstring of `p3b.core` or `p3b.vit` promises, a strategy that draws examples of everything that
the sentence speaks of, and a check. Drawn are zeros, negatives, ties, subnormal and huge numbers, empty and whole gates; what
is not finite has to be refused.
"""

from laws import allocation, masks, models, schedule

LAWS = (*allocation.LAWS, *masks.LAWS, *schedule.LAWS, *models.LAWS)
