"""Gates of the systems that move scales and rotations, as rows beside those of `jaxquant.gates`."""

from __future__ import annotations

from jaxquant import formats as F
from jaxquant.gates import Gate, nearest, outliers, pair
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.ops.tracked import Static
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_act import (
  mr_gptq,
  noisyquant,
  quarot,
  smoothquant,
  spinquant,
  svdquant,
)
from jaxquant.recipes.weight_act.noisyquant import INT6_TENSOR
from jaxquant.recipes.weight_only import affinequant, awq
from jaxquant.solvers.rtn import rtn


def unprepared(recipe: Recipe) -> Recipe:
  """The recipe without its steps."""
  return recipe.replace(prepare=())


def w4a4(scales: Static | None) -> Recipe:
  """NVFP4 weights and activations, whose tensor scale is dynamic or static."""
  rule = Rule(x=Operand(F.NVFP4, scales), w=Operand(F.NVFP4))
  return Recipe((("embed|head", FLOAT), (".*", rule)), name="nvfp4_w4a4")


RANKS = {f"rank {r}": svdquant(rank=r) for r in (8, 16, 32)}

TRANSFORM_GATES: dict[str, Gate] = {
  "awq": Gate(
    "AWQ <= 0.85 nearest at W3",
    {"awq": awq(F.UINT3_G128), "nearest": pair(None, F.UINT3_G128)},
    lambda kl: kl["awq"] <= 0.85 * kl["nearest"],
  ),
  "awq_outliers": Gate(
    "AWQ <= 0.6 nearest at W4, with outlier channels",
    {"awq": awq(), "nearest": pair(None, F.UINT4_G128)},
    lambda kl: kl["awq"] <= 0.6 * kl["nearest"],
    outliers(16),
  ),
  "smoothquant": Gate(
    "SmoothQuant <= 0.1 int8 per token, with outlier channels",
    {"smoothquant": smoothquant(), "int8": pair(F.INT8, F.INT8)},
    lambda kl: kl["smoothquant"] <= 0.1 * kl["int8"],
    outliers(40),
  ),
  "smoothquant_w6a6": Gate(
    "SmoothQuant <= 0.1 int6 per token, with outlier channels",
    {"smoothquant": smoothquant(F.INT6), "int6": pair(F.INT6, F.INT6)},
    lambda kl: kl["smoothquant"] <= 0.1 * kl["int6"],
    outliers(40),
  ),
  "static_ranges": Gate(
    "a static scale above NVFP4's blocks costs at most 5 %, one per int8 tensor more",
    {
      "nvfp4 static": w4a4(Static()),
      "nvfp4": w4a4(None),
      "smoothquant O3": smoothquant(static=True),
      "smoothquant O1": smoothquant(),
    },
    lambda kl: (
      kl["nvfp4 static"] <= 1.05 * kl["nvfp4"] and kl["smoothquant O3"] > kl["smoothquant O1"]
    ),
  ),
  "quarot": Gate(
    "QuaRot <= 0.4 SmoothQuant at W4A4, with outlier channels",
    {"quarot": quarot(solve=rtn), "smoothquant": smoothquant(F.INT4)},
    lambda kl: kl["quarot"] <= 0.4 * kl["smoothquant"],
    outliers(40),
  ),
  "quarot_gptq": Gate(
    "GPTQ improves QuaRot",
    {"gptq": quarot(), "nearest": quarot(solve=rtn)},
    lambda kl: kl["gptq"] <= kl["nearest"],
  ),
  "spinquant": Gate(
    "learned rotations are no worse than the Hadamard start after 30 steps",
    {"learned": spinquant(steps=30, solve=rtn), "start": spinquant(steps=0, solve=rtn)},
    lambda kl: kl["learned"] <= kl["start"],
  ),
  "mr_gptq": Gate(
    "MR-GPTQ <= 0.75 nearest in MXFP4, scales of the paper (4/3 of the floor)",
    {"mr_gptq": mr_gptq(), "nearest": pair(F.MXFP4_TENSOR, F.MXFP4_TENSOR)},
    lambda kl: kl["mr_gptq"] <= 0.75 * kl["nearest"],
  ),
  "mr_gptq_outliers": Gate(
    "MR-GPTQ <= 0.65 nearest in MXFP4, scales of the paper, with outlier channels",
    {"mr_gptq": mr_gptq(), "nearest": pair(F.MXFP4_TENSOR, F.MXFP4_TENSOR)},
    lambda kl: kl["mr_gptq"] <= 0.65 * kl["nearest"],
    outliers(16),
  ),
  "mr_gptq_floor": Gate(
    "MR-GPTQ <= 0.75 nearest in MXFP4, OCP floor scales",
    {"mr_gptq": mr_gptq(F.MXFP4), "nearest": pair(F.MXFP4, F.MXFP4)},
    lambda kl: kl["mr_gptq"] <= 0.75 * kl["nearest"],
  ),
  "mr_gptq_outliers_floor": Gate(
    "MR-GPTQ <= 0.65 nearest in MXFP4, OCP floor scales, with outlier channels",
    {"mr_gptq": mr_gptq(F.MXFP4), "nearest": pair(F.MXFP4, F.MXFP4)},
    lambda kl: kl["mr_gptq"] <= 0.65 * kl["nearest"],
    outliers(16),
  ),
  "mr_gptq_nvfp4": Gate(
    "in NVFP4 the rotation hurts nearest scales, and GPTQ without it helps",
    {
      "nearest": pair(F.NVFP4, F.NVFP4),
      "rotated": nearest(mr_gptq(F.NVFP4)),
      "gptq": mr_gptq(F.NVFP4, block=None),
    },
    lambda kl: kl["gptq"] <= kl["nearest"] <= kl["rotated"],
  ),
  "noisyquant": Gate(
    "a fixed noise below one step of a scale per tensor is no worse than none at W6A6",
    {"noise": noisyquant(), "none": pair(INT6_TENSOR, F.INT6)},
    lambda kl: kl["noise"] <= kl["none"],
  ),
  "svdquant": Gate(
    "each doubling of the rank helps, with outlier channels",
    RANKS | {"rank 0": nearest(svdquant()).replace(prepare=svdquant().prepare)},
    lambda kl: kl["rank 32"] < kl["rank 16"] < kl["rank 8"] < kl["rank 0"],
    outliers(40),
  ),
  "svdquant_smooth": Gate(
    "without smoothing the branch leaves 10 times the loss, with outlier channels",
    {"smooth": RANKS["rank 16"], "without": unprepared(RANKS["rank 16"])},
    lambda kl: 10 * kl["smooth"] <= kl["without"],
    outliers(40),
  ),
  "affinequant": Gate(
    "matrices in heads are no worse than scales alone",
    {"affine": affinequant(), "scales": affinequant(slope=0.0)},
    lambda kl: kl["affine"] <= kl["scales"],
  ),
}
