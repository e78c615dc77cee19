"""What the systems that learn, and vector quantization, have to show (`jaxquant.gates`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxquant.formats import INT4, UINT2_G64, UINT3_G128, Format
from jaxquant.gates import Gate, outliers
from jaxquant.kernels import Sum
from jaxquant.recipes.weight_act import smoothquant
from jaxquant.recipes.weight_only import w4a16_gptq, w4a16_rtn
from jaxquant.recipes.weight_only.cbq import cbq
from jaxquant.recipes.weight_only.omniquant import omniquant
from jaxquant.recipes.weight_only.ptq161 import UINT4_ROW, behind_gain, ptq161
from jaxquant.recipes.weight_only.vptq import vptq
from jaxquant.scales import ScaleRule
from jaxquant.solvers.rtn import rtn
from jaxquant.solvers.salient import salient
from jaxquant.statistics import HESSIAN

_salient = functools.partial(salient, high=UINT4_ROW, wrap=behind_gain)


def random_mask(w: jax.Array, importance: jax.Array, fmt: Format, rule: ScaleRule) -> Sum:
  """PTQ1.61's kernel with channels chosen by chance."""
  return _salient(w, jax.random.uniform(jax.random.key(0), importance.shape), fmt, rule=rule)


def hessian_mask(w: jax.Array, hessian: jax.Array, fmt: Format, rule: ScaleRule) -> Sum:
  """PTQ1.61's kernel with channels chosen by the diagonal of H."""
  return _salient(w, jnp.diagonal(hessian), fmt, rule=rule)


START = ptq161(steps=0)
LEARNED_GATES: dict[str, Gate] = {
  "vptq": Gate(
    "2 bits in codewords <= 0.8 GPTQ and <= 0.5 those without error feedback; tuning helps",
    {
      "tuned": vptq(),
      "vptq": vptq(tune=0),
      "first order": vptq(second_order=False, tune=0),
      "gptq": w4a16_gptq(UINT2_G64, order=True, static_groups=True),
      "gptq, no order": w4a16_gptq(UINT2_G64),
      "gptq, damping .1": w4a16_gptq(UINT2_G64, order=True, static_groups=True, damp=0.1),
    },
    lambda kl: kl["tuned"] <= kl["vptq"] <= min(0.8 * kl["gptq"], 0.5 * kl["first order"]),
  ),
  "omniquant": Gate(
    "learned ranges beat minimum and maximum at 2 and 3 bits",
    {
      "lwc w2": omniquant(UINT2_G64),
      "rtn w2": w4a16_rtn(UINT2_G64),
      "lwc w3": omniquant(UINT3_G128),
      "rtn w3": w4a16_rtn(UINT3_G128),
    },
    lambda kl: kl["lwc w2"] <= kl["rtn w2"] and kl["lwc w3"] <= kl["rtn w3"],
  ),
  "omniquant_let": Gate(
    "learned scales and ranges <= SmoothQuant at W4A4, with outlier channels",
    {"omniquant": omniquant(INT4, INT4), "smoothquant": smoothquant(INT4)},
    lambda kl: kl["omniquant"] <= kl["smoothquant"],
    outliers(40),
  ),
  "cbq": Gate(
    "learned rounding across two blocks <= within one <= nearest, at 2 bits",
    {
      "window 2": cbq(UINT2_G64),
      "window 1": cbq(UINT2_G64, window=1, overlap=0),
      "rtn": w4a16_rtn(UINT2_G64),
    },
    lambda kl: kl["window 2"] <= kl["window 1"] <= kl["rtn"],
  ),
  "ptq161_mask": Gate(
    "channels in 4 bits by the largest |x| < by chance < none",
    {
      "largest |x|": START,
      "diagonal of H": START.replace(solve=hessian_mask, statistic=HESSIAN),
      "by chance": START.replace(solve=random_mask),
      "none": START.replace(solve=rtn, statistic=None),
    },
    lambda kl: kl["largest |x|"] < kl["by chance"] < kl["none"],
  ),
  "ptq161": Gate(
    "30 steps of block-wise learning leave at most 0.7 of the loss",
    {"learned": ptq161(), "start": START},
    lambda kl: kl["learned"] <= 0.7 * kl["start"],
  ),
}
