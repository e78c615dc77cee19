"""Steps for `Recipe.prepare`: the function stays, and the weights quantize better."""

from jaxquant.steps.affine import LearnAffine
from jaxquant.steps.equivalent import LearnScales
from jaxquant.steps.keys import SmoothKeys, pair_amax, pair_norm
from jaxquant.steps.learn import LearnRotations
from jaxquant.steps.rotate import FuseGains, RotateHeads, RotateStream
from jaxquant.steps.search import SearchScales
from jaxquant.steps.smooth import Smooth

__all__ = [
  "FuseGains",
  "LearnAffine",
  "LearnRotations",
  "LearnScales",
  "RotateHeads",
  "RotateStream",
  "SearchScales",
  "Smooth",
  "SmoothKeys",
  "pair_amax",
  "pair_norm",
]
