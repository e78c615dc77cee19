"""Two runs on the same batches: what their losses differ by, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

BATCHES = 10  # Schmeiser (1982), Batch size effects: 10 to 30 serve any length of series


class Gap(NamedTuple):
  """A mean difference.

  Attributes:
    mean: of the differences.
    half_width: of its confidence interval; NaN if there are too few.
    n: differences.
  """

  mean: float
  half_width: float
  n: int

  def __str__(self) -> str:
    """`+0.0123 [+0.0100, +0.0146]`."""
    if math.isnan(self.half_width):
      return f"{self.mean:+.4f} [too few]"
    return (
      f"{self.mean:+.4f} [{self.mean - self.half_width:+.4f}, {self.mean + self.half_width:+.4f}]"
    )


def paired_gap(differences: np.ndarray, *, level: float = 0.95, batches: int = BATCHES) -> Gap:
  """Mean of a correlated series of paired differences, with a confidence interval.

      mean +- t_{b-1} s / sqrt(b)

  where s is the deviation of the means of b batches of n / b consecutive differences. The losses
  of neighbouring steps are correlated, those of long batches hardly (method of batch means); the
  batches of data are common to both runs and drop out. The interval is about these steps of these
  two runs: another seed is another pair.

  Args:
    differences: [n], in the order of the steps.
    level: of confidence.
    batches: b; with as many differences this is Student's interval. With one, or fewer
      differences, there is none.

  Raises:
    ValueError: there is no difference.

  Example:
    >>> print(paired_gap(np.tile([0.1, 0.3], 20)))
    +0.2000 [+0.2000, +0.2000]
  """
  d = np.asarray(differences, np.float64)
  if not d.size:
    raise ValueError("paired_gap: no differences")
  size = d.size // batches
  if size < 1 or batches < 2:
    return Gap(float(d.mean()), math.nan, d.size)
  means = d[d.size - size * batches :].reshape(batches, size).mean(-1)
  quantile = float(stdtrit(batches - 1, (1 + level) / 2))
  return Gap(float(d.mean()), quantile * float(means.std(ddof=1)) / math.sqrt(batches), d.size)
