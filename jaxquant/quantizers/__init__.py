"""Quantizers with parameters, for quantization-aware training: parts of a `Learned` site."""

from jaxquant.quantizers.binary import (
  Bases,
  Binary,
  Fourier,
  bireal,
  clip,
  clip_open,
  fourier,
  identity,
)
from jaxquant.quantizers.low_rank import Branch
from jaxquant.quantizers.lsq import LsqInput, LsqWeight, TokenRange
from jaxquant.quantizers.mimic import mimic_loss, principal_directions
from jaxquant.quantizers.noise import GaussianNoise
from jaxquant.quantizers.parts import (
  Centered,
  Chain,
  Clamped,
  Part,
  Parts,
  Scale,
  Shift,
  Trained,
  Unit,
)

__all__ = [
  "Bases",
  "Binary",
  "Branch",
  "Centered",
  "Chain",
  "Clamped",
  "Fourier",
  "GaussianNoise",
  "LsqInput",
  "LsqWeight",
  "Part",
  "Parts",
  "Scale",
  "Shift",
  "TokenRange",
  "Trained",
  "Unit",
  "bireal",
  "clip",
  "clip_open",
  "fourier",
  "identity",
  "mimic_loss",
  "principal_directions",
]
