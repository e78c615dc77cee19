"""What post-training quantization has to show before it counts as working: the list of gates.

An item names a gate of one of the tables (`jaxquant.gates` and its neighbours), or tests; an item
whose gate nobody has written is "not built". Items with a `report` are measured, not judged: the
claim is not expected to show on a model of this size.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxquant
from jaxquant import formats as F
from jaxquant.gates import SKIP, Change, Gate, pair
from jaxquant.graph import graph_of, matrix
from jaxquant.intercept import collect
from jaxquant.kernels import LowRank, is_node, map_kernels, to_dense
from jaxquant.ops.qdot import weight_only
from jaxquant.ptq import quantize_params
from jaxquant.recipe import Recipe
from jaxquant.recipes.weight_only import w4a16_gptq, w4a16_rtn
from jaxquant.recipes.weight_only.bitstack import bitstack
from jaxquant.recipes.weight_only.boa import boa
from jaxquant.recipes.weight_only.eora import eora
from jaxquant.recipes.weight_only.quantease import quantease
from jaxquant.recipes.weight_only.rsq import rsq
from jaxquant.sites import flat_params
from jaxquant.solvers.gptq import proxy_loss
from jaxquant.solvers.low_rank import low_rank
from jaxquant.statistics import HESSIAN

Values = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Probe:
  """A claim that is measured otherwise than by the KL of some recipes.

  Attributes:
    claim: in words.
    run: (model, float variables, calibration, held_out) -> {label: value}.
    holds: of those values.
    unit: what they are.
    change: of the float variables first.
  """

  claim: str
  run: Callable[[nn.Module, dict, list, list], dict[str, float]]
  holds: Callable[[Values], bool]
  unit: str
  change: Change | None = None


@dataclasses.dataclass(frozen=True)
class Item:
  """A line of the list.

  Attributes:
    number: of the list.
    gate: its name in the tables; "" for tests.
    wants: the claim, as long as there is no gate.
    report: why it is reported and not judged.
    tests: pytest ids that decide instead.
  """

  number: str
  gate: str = ""
  wants: str = ""
  report: str = ""
  tests: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SameMemory:
  """Solver: the plain SVD of w with the memory of `bitstack(r, n)`, factors in float16.

  Attributes:
    r: rank of the magnitudes.
    n: layers.
  """

  r: int
  n: int

  def __call__(self, w: jax.Array, statistic: object, fmt: F.Format) -> LowRank:
    """The factors."""
    del statistic, fmt
    k, n = w.shape
    bits = self.n * (k * n + 16 * self.r * (k + n))
    return low_rank(w, max(1, bits // (16 * (k + n))))


def _hessians(model: nn.Module, variables: dict, calibration: list) -> dict[str, jax.Array]:
  run = jax.jit(collect(model, Recipe(), HESSIAN))
  found = [run(variables, batch) for batch in calibration]
  return {path: HESSIAN.finish(sum(f[path] for f in found)) for path in found[0]}


def proxies(model: nn.Module, variables: dict, calibration: list, held_out: list) -> dict:
  """Mean over all weights of the relative output error that each solver leaves at 3 bits."""
  del held_out
  recipes = {"quantease": quantease(F.INT3_G128), "gptq": w4a16_gptq(F.INT3_G128, **ORDERED)}
  hessians, flat = _hessians(model, variables, calibration), flat_params(variables)
  wanted = lambda site: site in hessians and not re.fullmatch(SKIP, site)
  losses: dict[str, list] = {name: [] for name in recipes}
  for weight in (w for w in graph_of(model).weights if wanted(w.site)):
    w, h = matrix(flat, weight), hessians[weight.site]
    for name, recipe in recipes.items():
      losses[name].append(_proxies(recipe)(w, h).ravel())
  return {name: float(jnp.concatenate(found).mean()) for name, found in losses.items()}


@functools.cache
def _proxies(recipe: Recipe) -> Callable:
  """Jitted (w [L, K, N], H [L, K, K]) -> relative output errors [L]."""

  def one(pair):
    w, h = pair
    return proxy_loss(w, to_dense(recipe.solve(w, h, F.INT3_G128)), h)

  return jax.jit(lambda w, h: jax.lax.map(one, (w, h)))


def dense(model: nn.Module, variables: dict, recipe: Recipe, calibration: list) -> dict:
  """The variables a recipe packs, as float ones of the model."""
  packed = quantize_params(model, variables, recipe, calibration, progress=False)
  values = map_kernels(lambda k: to_dense(k) if is_node(k) else k, packed)
  return jax.tree.map(lambda a, w: a.reshape(w.shape), values, variables)


def attention_errors(model: nn.Module, variables: dict, calibration: list, held_out: list) -> dict:
  """Error of the attention output under BoA over that under GPTQ, by layer, at 2 bits."""
  rules = ((".*attn/[qkv]", weight_only(F.UINT2_G64)),)
  gptq = w4a16_gptq(F.UINT2_G64, **ORDERED)

  @jax.jit
  def outputs(variables):
    wanted = lambda module, _: module.name == "attn"
    tokens = held_out[0][:, :-1]
    _, state = model.apply(
      variables, tokens, capture_intermediates=wanted, mutable=["intermediates"]
    )
    return jax.tree.leaves(state["intermediates"], is_leaf=lambda x: isinstance(x, tuple))[0][0][0]

  expected = outputs(variables)
  error = {}
  for name, recipe in (("boa", boa(F.UINT2_G64)), ("gptq", gptq)):
    found = outputs(dense(model, variables, recipe.replace(rules=rules), calibration))
    error[name] = jnp.sqrt(jnp.square(found - expected).reshape(len(found), -1).sum(-1))
  return {f"layer {i}": float(r) for i, r in enumerate(error["boa"] / error["gptq"])}


ORDERED = {"order": True, "static_groups": True}
W3_CHANNEL = F.Format(F.int_grid(3))
RANKS = (8, 16, 32)

GATES: dict[str, Gate | Probe] = {
  "gptq": Gate(
    "GPTQ (static order) <= 0.35 nearest at W3",
    {"gptq": w4a16_gptq(F.UINT3_G128, **ORDERED), "nearest": pair(None, F.UINT3_G128)},
    lambda kl: kl["gptq"] <= 0.35 * kl["nearest"],
  ),
  "quantease_proxy": Probe(
    "QuantEase's output error is within 15 % of GPTQ's",
    proxies,
    lambda v: abs(v["quantease"] / v["gptq"] - 1) <= 0.15,
    "relative output error",
  ),
  "eora": Gate(
    "EoRA <= 0.85 SVD from rank 8, and falls with the rank",
    {f"eora {r}": eora(F.UINT3_G128, r=r) for r in RANKS}
    | {f"svd {r}": eora(F.UINT3_G128, r=r, eigenspace=False) for r in RANKS},
    lambda kl: (
      all(kl[f"eora {r}"] <= 0.85 * kl[f"svd {r}"] for r in RANKS)
      and kl["eora 8"] > kl["eora 16"] > kl["eora 32"]
    ),
  ),
  "boa_attention": Probe(
    "BoA's error of the attention output <= 0.95 GPTQ's in each layer, q, k and v in 2 bits",
    attention_errors,
    lambda v: max(v.values()) <= 0.95,
    "error over GPTQ's",
  ),
  "bitstack_svd": Gate(
    "four layers of rank 4 are 4 times better than a plain SVD of the same memory",
    {
      "bitstack": bitstack(r=4, n=4, scaled=False),
      "svd": w4a16_rtn().replace(solve=SameMemory(4, 4), name="svd"),
    },
    lambda kl: 4 * kl["bitstack"] <= kl["svd"],
  ),
  "rsq": Gate(
    "RSQ < GPTQ at W3, one scale per channel",
    {"rsq": rsq(W3_CHANNEL), "gptq": w4a16_gptq(W3_CHANNEL)},
    lambda kl: kl["rsq"] < kl["gptq"],
  ),
  "bitstack_scaled": Gate(
    "scaling by the inputs helps BitStack",
    {"scaled": bitstack(r=4, n=4), "as is": bitstack(r=4, n=4, scaled=False)},
    lambda kl: kl["scaled"] < kl["as is"],
  ),
}
SMALL = "does not show on models of a few million weights"
SOLVERS, AWARE = "tests/solvers/test_solvers.py", "tests/solvers/test_attention_aware.py"

ITEMS: tuple[Item, ...] = (
  Item("1", "gptq"),
  Item("1", "quantease_proxy"),
  Item("2", "awq"),
  Item("2", "awq_outliers"),
  Item("3", "smoothquant"),
  Item("3", "smoothquant_w6a6"),
  Item("3", "llm_int8"),
  Item("3", "quarot"),
  Item("3", "smooth_attention"),
  Item("3", "fp8_activations"),
  Item("3", "flexq_types"),
  Item("4", "mr_gptq"),
  Item("4", "mr_gptq_outliers"),
  Item("4", "mr_gptq_nvfp4"),
  Item("5", "eora"),
  Item("6", "bitmod"),
  Item("7", "vptq"),
  Item("8", "boa_attention"),
  Item("9", "qoq"),
  Item(
    "9",
    tests=("tests/recipes/test_weight_act.py::test_protective_range",),
    wants="QoQ: no int8 overflow within the protected range",
  ),
  Item("10", "svdquant"),
  Item("10", "svdquant_smooth"),
  Item("11", "bitstack_svd"),
  Item("12", "ptq161_mask"),
  Item("13", "allocation"),
  Item(
    "14",
    wants="GPTQ is nearest for a diagonal H",
    tests=(f"{SOLVERS}::test_diagonal_hessian_is_rtn_bit_for_bit",),
  ),
  Item(
    "14",
    wants="BoA is GPTQ without coupling",
    tests=(f"{AWARE}::test_without_coupling_it_is_gptq_bit_for_bit",),
  ),
  Item(
    "14",
    wants="RSQ is GPTQ for equal tokens",
    tests=(f"{AWARE}::test_weights_of_one_are_gptq_and_others_lower_the_weighted_loss",),
  ),
  Item("14", "bipolar", "bit planes of bipolar integers are exact"),
  Item("14", "lut", "table look-up matmul is exact"),
  Item("14", "dyadic", "dyadic requantization within half a step"),
  Item("14", "df11", "DF11 round trip, bit for bit"),
  Item("14", "mpo", "MPO at full bond is exact"),
  Item("report", "rsq", report=SMALL),
  Item("report", "bitstack_scaled", report=SMALL),
  Item("report", "noisyquant", report=SMALL),
  Item("report", "q_vlm", "entropy tracks the loss across layers", report=SMALL),
  Item("report", "layerwise", report="6 layers, 8 asked for"),
)


def tables() -> dict[str, Gate | Probe]:
  """All gates there are: those above and those of every module whose name ends in "gates".

  Raises:
    ValueError: two gates have one name.
  """
  found: dict[str, Gate | Probe] = dict(GATES)
  for module in pkgutil.iter_modules(jaxquant.__path__):
    if module.name.endswith("gates"):
      for name, value in vars(importlib.import_module(f"jaxquant.{module.name}")).items():
        if name.endswith("GATES"):
          twice = [k for k in value if found.setdefault(k, value[k]) is not value[k]]
          if twice:
            raise ValueError(f"jaxquant.{module.name}: there are other gates named {twice}.")
  return found


def items(gates: Mapping[str, Gate | Probe]) -> tuple[Item, ...]:
  """The list, and what other gates there are."""
  named = {item.gate for item in ITEMS}
  return (*ITEMS, *(Item("more", name) for name in gates if name not in named))
