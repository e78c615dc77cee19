"""Enumerating the design space of FP4 training, and what its options cost (arXiv:2509.17791).

An axis is a table of options by label, an option is some keywords of `fp4_space`; `space` is their
product. The cost model sees any `Rule`. Its constants are proposals, not the paper's, which could
not be read: operations per element of an operand, beside the multiplication by the scale and the
cast that every choice needs.

| what | operations per element |
|---|---|
| maximum of the block | 1 |
| block scale | 2 / block (a division, a cast) |
| tensor scale | 1 (the maximum once more, before anything can be rounded: a synchronisation) |
| rotation in blocks of n | log2 n (butterflies) |
| stochastic rounding | 2 (a random number, a comparison) |
| soft maximum | 3 (an exponential, two sums) |
| gradient estimators | 1 to 5, see `FUNCTION_OPS` |

Bytes that are kept for the backward pass are not proposals: `saved_by` counts them. Training aids
are not part of a recipe, so they are no axis: the loss scale and the optimizer (`OPTIMIZERS`) are
arguments of `train`.

`regression` and `train` are a task small enough for hundreds of rules; benchmarks/fp4_space.py
writes docs/results/fp4_space.md from it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Var

from jaxquant import estimators, formats, observers, scales
from jaxquant.formats import Format
from jaxquant.ops.hadamard import RHT_SIGNS
from jaxquant.ops.qdot import Operand, Rotation, Rule, qdot
from jaxquant.optimizers import scale_by_stable_adam, scale_by_stable_spam
from jaxquant.recipe import Recipe
from jaxquant.recipes.training.fp4_space import fp4_space
from jaxquant.rounding import ceil, stochastic

Options = Mapping[str, Mapping[str, object]]

RHT, H = Rotation(16, RHT_SIGNS), Rotation(16)
SHARPNESS = 16.0  # of the soft maximum; the smallest error on a normal (.0086; the maximum .0089)

AXES: dict[str, Options] = {
  "scale": {
    "e8m0": {},  # the OCP floor rule
    "e8m0 up": {"rule": scales.ocp_ceil},
    "e8m0+ts": {
      "scale": Format(formats.E8M0, None, None),
      "rule": scales.tensor_scaled(1.0, ceil),
    },
    "e4m3": {"scale": formats.E4M3, "rule": scales.absmax},
    "e4m3+ts": {"scale": formats.PER_TENSOR_E4M3, "rule": scales.tensor_scaled(448.0)},
    "ue5m3": {"scale": formats.UE5M3, "rule": scales.absmax},
    "ue5m3+ts": {"scale": formats.PER_TENSOR_UE5M3, "rule": scales.tensor_scaled(114688.0)},
    "f32": {"scale": None, "rule": scales.absmax},
  },
  "block": {"32": {}, "16": {"block": 16}},
  "maximum": {"max": {}, "soft": {"smooth": SHARPNESS}},
  "rounding": {
    "rne": {},
    "sr": {"backward": stochastic},
    "sr all": {"forward": stochastic, "backward": stochastic},
  },
  "rotation": {
    "-": {},
    "rht w": {"wgrad": RHT},
    "rht dw": {"dgrad": RHT, "wgrad": RHT},
    "rht": {"fprop": RHT, "dgrad": RHT, "wgrad": RHT},
    "h": {"fprop": H, "dgrad": H, "wgrad": H},
  },
  "gradient": {
    "ste": {},
    "clip": {"gradient": estimators.clipped_ste},
    "dge": {"gradient": estimators.dge()},
    "spline": {"gradient": estimators.spline()},
    "scale": {"gradient": estimators.through_scale()},
    "soft scale": {"gradient": estimators.through_scale(sharpness=SHARPNESS)},
  },
}


def choose(**labels: str) -> Recipe:
  """One point of the space: a label per axis, the first option where none is given.

  Raises:
    ValueError: for an axis or a label that is not there, naming those that are.

  Example:
    >>> choose(scale="ue5m3", rounding="sr").name
    'ue5m3/32/max/sr/-/ste'
  """
  if unknown := set(labels) - set(AXES):
    raise ValueError(f"choose: no axes {sorted(unknown)}; there are {', '.join(AXES)}")
  picked = {}
  for axis, options in AXES.items():
    label = labels.get(axis, next(iter(options)))
    if label not in options:
      raise ValueError(f"choose: {axis} is one of {', '.join(options)}; got {label!r}")
    picked[axis] = {label: options[label]}
  (recipe,) = space(picked).values()
  return recipe


def space(axes: Mapping[str, Options] = AXES) -> dict[str, Recipe]:
  """Every combination of one option per axis, by label.

  Example:
    >>> len(space())
    2880
    >>> list(space({n: AXES[n] for n in ("scale", "block")}))[-1]
    'f32/16'
  """
  found = {}
  for options in itertools.product(*(axis.items() for axis in axes.values())):
    label = "/".join(name for name, _ in options)
    keywords = {k: v for _, given in options for k, v in given.items()}
    found[label] = fp4_space(**keywords).replace(name=label)
  return found


FUNCTION_OPS: dict[Callable, float] = {
  estimators.clipped_ste: 1,  # a comparison
  estimators.trusted: 1,
  estimators.dge(): 2,  # a look-up of 8 slopes, a product
  estimators.spline(): 2,
  estimators.through_scale(): 2 + 1 / 32,  # multiply and add, a scatter per block
  estimators.through_scale(sharpness=SHARPNESS): 5,  # and the softmax
} | {
  observers.smoothed(SHARPNESS, option.get("rule", scales.ocp_floor)): 3
  for option in AXES["scale"].values()
}


def operand_ops(operand: Operand, functions: Mapping[Callable, float] = FUNCTION_OPS) -> float:
  """Operations per element of quantizing one operand, by the table above; 0 in high precision.

  Args:
    operand: of a rule.
    functions: operations of estimators, and of scale rules that cost more than a maximum.

  Raises:
    ValueError: for an estimator that `functions` does not have.
  """
  if operand.fmt is None:
    return 0.0
  if operand.gradient is not None and operand.gradient not in functions:
    raise ValueError(
      f"no cost is known of the estimator {operand.gradient.__name__}; "
      "pass functions=FUNCTION_OPS | {it: operations per element}"
    )
  fmt, turn = operand.fmt, operand.rotation
  ops = 1 + 2 / ((fmt.block or math.inf) * (fmt.block_n or math.inf))
  ops += isinstance(fmt.scale, Format)
  ops += 0 if turn is None else math.log2(turn.block)
  ops += 2 * (operand.rounding is stochastic)
  return ops + functions.get(operand.scales, 0) + functions.get(operand.gradient, 0)


def overhead(
  rule: Rule, m: int, k: int, n: int, functions: Mapping[Callable, float] = FUNCTION_OPS
) -> float:
  """Operations of quantization over those of the three GEMMs, 6 M K N.

  Args:
    rule: any.
    m: tokens.
    k: contraction of the forward GEMM.
    n: outputs.
    functions: as of `operand_ops`.

  Example:
    >>> from jaxquant.formats import MXFP4
    >>> each = Operand(MXFP4)
    >>> rule = Rule(each, each, each, each, each, each)
    >>> overhead(rule, 4096, 4096, 4096) == 6 * (1 + 2 / 32) * 4096**2 / (6 * 4096**3)
    True
  """
  sizes = {"x": m * k, "w": k * n, "g": m * n}
  ops = {name: operand_ops(o, functions) for name, o in rule.operands.items()}
  return sum(ops[name] * sizes[name[-1]] for name in ops) / (6 * m * k * n)


def saved_bytes(f: Callable, *args: object, held: Sequence[int] = ()) -> int:
  """Bytes that `jax.vjp(f, *args)` keeps from the forward to the backward pass.

  Counted from shapes, nothing runs; an array that is kept twice counts once.

  Args:
    f: differentiable; custom VJPs keep what their rules say.
    *args: arrays or ShapeDtypeStructs, in trees.
    held: numbers of the arguments that exist anyway, such as parameters; they count nothing.

  Example:
    >>> x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    >>> saved_bytes(jnp.sin, x), saved_bytes(lambda x: 2 * x, x)  # cos x; nothing
    (128, 0)
  """
  kept = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(f, *args)[1]))(*args).jaxpr
  sizes = [len(jax.tree.leaves(a)) for a in args]
  starts = np.cumsum([0, *sizes])
  free = {v for i in held for v in kept.invars[starts[i] : starts[i + 1]]}
  found = {v for v in kept.outvars if isinstance(v, Var)} - free
  return sum(v.aval.size * v.aval.dtype.itemsize for v in found)


def saved_by(rule: Rule, m: int, k: int, n: int, dtype: jnp.dtype = jnp.float32) -> int:
  """Bytes that a site keeps for its backward pass beside its weight and the rule's state.

  High precision keeps x. So does a rule whose backward operands come from the original x; one whose
  operands come from the forward pass keeps the quantized x, in 32 bits or as `Rule.keep_packed`
  says, and the quantized w, which is another array than the parameter. An estimator of gradients
  keeps both the original and the quantized operand.

  Args:
    rule: without learned quantizers.
    m: tokens.
    k: contraction of the forward GEMM.
    n: outputs.
    dtype: of x.

  Example:
    >>> saved_by(Rule(), 64, 32, 32) == 64 * 32 * 4
    True
  """
  shapes = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((k, n), jnp.float32)
  trackers = rule.tracked
  state = {n: t.init() for n, t in trackers.items() if n != "patch"}
  state |= {"patch": rule.patch.init(k)} if rule.patch else {}
  key = jax.random.key(0)
  site = lambda x, w, state: qdot(x, w, rule, key, state)
  return saved_bytes(site, *shapes, state, held=(1, 2))


def gain(reference: float, loss: float, overhead: float, price: float = 1.0) -> float:
  """(reference - loss) / |reference| - price * overhead: what a choice is worth, higher is better.

  Args:
    reference: loss of the choice that is compared with.
    loss: of this choice.
    overhead: of this choice, above that of the reference.
    price: how much relative loss a share of the GEMMs' operations is worth.

  Example:
    >>> gain(2.0, 1.5, 0.125)
    0.125
  """
  return (reference - loss) / abs(reference) - price * overhead


class Regression(NamedTuple):
  """A teacher of two layers seen through samples. S seeds, T steps, B samples, D width.

  Attributes:
    weights: where the student starts, float32 [S, 2, D, D].
    inputs: [S, T, B, D].
    targets: [S, T, B, D], of mean square one.
    keys: of a step's random rounding, uint32 [S, T, 2, 2].
  """

  weights: jax.Array
  inputs: jax.Array
  targets: jax.Array
  keys: jax.Array


def regression(seeds: int, steps: int, *, batch: int = 64, width: int = 32) -> Regression:
  """The task: y = relu(relu(x) V_0) V_1 for normal x and V, fresh samples at every step."""
  rng = np.random.default_rng(0)
  start, teacher = rng.standard_normal((2, seeds, 2, width, width)) / math.sqrt(width)
  x = rng.standard_normal((seeds, steps, batch, width))
  y = np.maximum(np.maximum(x, 0) @ teacher[:, None, 0], 0) @ teacher[:, None, 1]
  y /= np.sqrt(np.square(y).mean((1, 2, 3), keepdims=True))
  keys = rng.integers(0, 2**32, (seeds, steps, 2, 2), dtype=np.uint32)
  return Regression(*(jnp.asarray(a, jnp.float32) for a in (start, x, y)), jnp.asarray(keys))


_layers = lambda path, leaf: 1  # two in one leaf

OPTIMIZERS: dict[str, optax.GradientTransformation] = {
  "adam": optax.scale_by_adam(eps=1e-30),
  "stable adam": scale_by_stable_adam(eps=1e-30, stacked=_layers),
  # The paper's 1000 steps are a twentieth of its runs.
  "stable spam": scale_by_stable_spam(eps=1e-30, reset=100, stacked=_layers),
}


def train(
  rule: Rule,
  task: Regression,
  *,
  loss_scales: Sequence[float] = (1.0,),
  rate: float = 1e-2,
  optimizer: optax.GradientTransformation = OPTIMIZERS["adam"],
) -> jax.Array:
  """Trains a student of the teacher's shape under a rule, its rate following a cosine to zero.

  All seeds and loss scales are one program: what depends on the rule is compiled once. The
  optimizers do not see the size of gradients, so a loss scale moves nothing but their place in the
  format.

  Args:
    rule: of both layers.
    task: what is learned.
    loss_scales: the loss is multiplied by, [L].
    rate: at the start.
    optimizer: what updates are before the rate, such as one of `OPTIMIZERS`.

  Returns:
    Mean loss over the last tenth of the steps, relative to predicting zero, [L, S].
  """
  of_seeds = jax.vmap(lambda scale, seed: _train(rule, seed, scale, rate, optimizer), (None, 0))
  # Compiling is most of the work, and a third less of it without LLVM's optimization.
  run = jax.jit(jax.vmap(of_seeds, (0, None)), compiler_options={_EFFORT: 0})
  return run(jnp.asarray(loss_scales, jnp.float32), task)


_EFFORT = "xla_backend_optimization_level"


def _train(
  rule: Rule,
  task: Regression,
  scale: jax.Array,
  rate: float,
  optimizer: optax.GradientTransformation,
) -> jax.Array:
  steps = len(task.inputs)
  schedule = optax.cosine_decay_schedule(rate, steps)
  tx = optax.chain(optimizer, optax.scale_by_learning_rate(schedule))

  def loss(weights: jax.Array, batch: tuple) -> jax.Array:
    x, y, keys = batch
    layer = lambda h, wk: (qdot(jax.nn.relu(h), wk[0], rule, wk[1]), None)
    return scale * jnp.square(jax.lax.scan(layer, x, (weights, keys))[0] - y).mean()

  def step(carry: tuple, batch: tuple) -> tuple:
    weights, state = carry
    value, grads = jax.value_and_grad(loss)(weights, batch)
    updates, state = tx.update(grads, state)
    return (weights + updates, state), value

  start = task.weights, tx.init(task.weights)
  path = jax.lax.scan(step, start, (task.inputs, task.targets, task.keys))[1]
  return path[-max(1, steps // 10) :].mean() / scale
