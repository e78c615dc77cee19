"""What low-precision training has to show at a small size: which recipes lose less than which.

The order is that of measurements on another model of this size whose gaps were larger than the
noise of the seed. What was within the noise there (stochastic rounding against nearest, rotations
against none, Quartet against plain MXFP4) is reported and not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

FLOAT = "f32"
EIGHT_BITS = ("mxint8", "mxfp8")
NVFP4 = ("nvfp4", "quartet2")
MXFP4 = ("quartet", "mxfp4")
CHON = ("chon", "chon_unpatched")
ORDERED = (FLOAT, *EIGHT_BITS, "w8a8_int8", *NVFP4, *CHON, *MXFP4, "mxint4")
VARIANTS = {  # name: (row of the systems table, its knobs)
  "chon_unpatched": ("chon", {"patch_x": False, "patch_w": False}),
  "chon_32": ("chon", {"k": 32}),
}
MOST = 1.03  # of the float loss, for every recipe but MXINT4


@dataclasses.dataclass(frozen=True)
class Claim:
  """Every loss of `low`, times `factor` if it is a bound, is below every loss of `high`.

  Attributes:
    text: for people.
    low: names whose losses are lower.
    high: names whose losses are higher.
    factor: of the losses of `high`.
    judged: whether it passes or fails; else it is reported.
  """

  text: str
  low: tuple[str, ...]
  high: tuple[str, ...]
  factor: float = 1.0
  judged: bool = True

  @property
  def names(self) -> tuple[str, ...]:
    """All that it is about."""
    return self.low + self.high

  def against(self, loss: Mapping[str, float]) -> list[str]:
    """The pairs that contradict it, in words; none if it holds.

    Example:
      >>> Claim("", ("a",), ("b",)).against({"a": 2.0, "b": 1.0})
      ['a 2.0000 is not below b 1.0000']
    """
    bound = "" if self.factor == 1 else f"{self.factor:g} "
    return [
      f"{a} {loss[a]:.4f} is not below {bound}{b} {loss[b]:.4f}"
      for a in self.low
      for b in self.high
      if not loss[a] < self.factor * loss[b]
    ]


_ORDER = (
  Claim("float32, MXINT8, MXFP8 < NVFP4, Quartet II", (FLOAT, *EIGHT_BITS), NVFP4),
  Claim("NVFP4, Quartet II < MXFP4, Quartet", NVFP4, MXFP4),
  Claim("MXFP4, Quartet < MXINT4", MXFP4, ("mxint4",)),
)
_BOUND = tuple(
  Claim(f"{name} < {MOST} float32", (name,), (FLOAT,), MOST)
  for name in ORDERED
  if name not in (FLOAT, "mxint4")
)
_REPORTED = (
  Claim("CHON < NVFP4", ("chon",), ("nvfp4",), judged=False),
  Claim("CHON < CHON without its patch", ("chon",), ("chon_unpatched",), judged=False),
  Claim("Quartet < MXFP4", ("quartet",), ("mxfp4",), judged=False),
  Claim("Quartet II < NVFP4", ("quartet2",), ("nvfp4",), judged=False),
)
CLAIMS: dict[str, tuple[Claim, ...]] = {
  "softmax": (*_ORDER, *_BOUND, *_REPORTED),
  "gla": tuple(dataclasses.replace(c, judged=False) for c in (*_ORDER, *_BOUND, *_REPORTED)),
  "outliers": _REPORTED,
  "larger": (
    *_REPORTED[:3],
    Claim("CHON, k = 32 < CHON", ("chon_32",), ("chon",), judged=False),
  ),
}
