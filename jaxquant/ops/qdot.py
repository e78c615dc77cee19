"""The quantized contraction: qdot, and what it does to the six operands of a `Rule`.

Training, PTQ and decode call this one function: a float weight is quantized on the way in, a packed
one is not, and the bits of y are the same. Each of the six operands has a format, a scale rule, a
rounding, a rotation and a source (`jaxquant.ops.rule`).

What a rule remembers from step to step (delayed scales, hot channels) comes in as `state` and is
not changed here. What it saw of this step leaves as the gradient with respect to the state's leaves
called "seen": forward and backward observations then take one road, which scans, remat and vmap
already know (`jaxquant.state` turns them into the next state).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.encoding import encode
from jaxquant.ops import dispatch, pallas
from jaxquant.ops.contract import Axes
from jaxquant.ops.hadamard import rotate
from jaxquant.ops.rule import (
  FLOAT,
  STE,
  Operand,
  Rotation,
  Rule,
  Source,
  weight_only,
)
from jaxquant.ops.tracked import State, Tracked
from jaxquant.rounding import fold, nearest_even, uniform
from jaxquant.tensor import QTensor, dequantize, pack

__all__ = [
  "FLOAT",
  "STE",
  "Operand",
  "Rotation",
  "Rule",
  "Source",
  "qdot",
  "quantize_operand",
  "weight_only",
]


def quantize_operand(
  x: jax.Array,
  operand: Operand,
  axis: int,
  key: jax.Array | None = None,
  *,
  rhs: bool = False,
  state: State | None = None,
) -> jax.Array | QTensor:
  """The operand of a GEMM: x rotated and encoded as it says, or x itself in high precision.

  Args:
    x: array.
    operand: what to do.
    axis: of x that is contracted, -1 or -2.
    key: of the GEMM; both operands share its rotation signs, not its rounding noise.
    rhs: whether x is the second operand.
    state: of a scale rule that keeps one.
  """
  return _encoded(_turned(x, operand, axis, key), operand, axis, key, rhs=rhs, state=state)


def _turned(x: jax.Array, operand: Operand, axis: int, key: jax.Array | None) -> jax.Array:
  return x if operand.rotation is None else _rotated(x, operand.rotation, axis, key)


def _encoded(
  x: jax.Array,
  operand: Operand,
  axis: int,
  key: jax.Array | None = None,
  *,
  rhs: bool = False,
  state: State | None = None,
) -> jax.Array | QTensor:
  if operand.fmt is None:
    return x
  plain = operand.scales is None and operand.rounding is nearest_even
  if plain and axis == -1 and not rhs and pallas.quantizes(x, operand.fmt):
    return pallas.quantized_rows(x, operand.fmt)
  noise = None if key is None else fold(key, 1 + rhs)
  rule = operand.scales
  if isinstance(rule, Tracked):
    rule = functools.partial(rule.scales, state)
  elif getattr(rule, "random", False):
    rule = functools.partial(rule, key=fold(noise, 0))
  return encode(x, operand.fmt, axis=axis, rule=rule, rounding=operand.rounding, key=noise)


def _rotated(x: jax.Array, rotation: Rotation, axis: int, key: jax.Array | None) -> jax.Array:
  pad = -x.shape[axis] % rotation.block
  if pad:  # zeros add nothing to the contraction
    x = jnp.pad(x, [(0, 0)] * (x.ndim + axis) + [(0, pad)] + [(0, 0)] * (-axis - 1))
  return rotate(x, rotation.block, axis, _signs(rotation, key))


def _signs(rotation: Rotation, key: jax.Array | None) -> jax.Array | tuple[int, ...] | None:
  if not rotation.random:
    return rotation.signs
  return jnp.where(uniform(fold(key, 0), (rotation.block,)) < 0.5, -1.0, 1.0)


def _unrotated(
  x: jax.Array, rotation: Rotation | None, axis: int, key: jax.Array | None, shape: tuple[int, int]
) -> jax.Array:
  """A gradient with respect to a rotated operand, in the operand's own basis and shape."""
  if rotation is None:
    return x
  x = rotate(x, rotation.block, axis, _signs(rotation, key), inverse=True)
  return x[: shape[0], : shape[1]]


def qdot(
  x: jax.Array,
  w: jax.Array | QTensor,
  rule: Rule = FLOAT,
  key: jax.Array | None = None,
  state: dict[str, State] | None = None,
) -> jax.Array:
  """Y = Q(x) @ Q(w), differentiable as the rule's other four operands say.

  Args:
    x: [M, K], float; its dtype is the compute dtype.
    w: [K, N], float in its parameter dtype, or a QTensor of `rule.w.fmt`.
    rule: what happens to the six operands.
    key: for stochastic rounding and random rotations.
    state: of what the rule tracks, by `Rule.tracked`. Its leaves "seen" get this step's
      observations as their gradient.

  Returns:
    [M, N] in x.dtype. Gradients: dx in x.dtype, dw float32 cast to w.dtype; none for a QTensor.

  Raises:
    ValueError: shapes that do not match, a packed weight of another format than the rule's, under a
      random rotation or a patch, a random rule without a key, or one with state without it.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxquant.formats import INT8
    >>> qdot(jnp.ones((1, 2)), jnp.ones((2, 1)), Rule(x=Operand(INT8), w=Operand(INT8))).tolist()
    [[2.0]]
  """
  if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
    raise ValueError(f"qdot wants x [M, K] and w [K, N], got {list(x.shape)} and {list(w.shape)}")
  if isinstance(w, QTensor):
    _check_packed(w, rule)
  if rule.needs_key and key is None:
    raise ValueError(
      f"the rule is random ({rule}) and no key came in. With jaxquant.quantized pass "
      "rngs={'sr': key} to apply; under nn.scan list 'sr' in split_rngs."
    )
  tracked = rule.tracked
  missing = sorted(set(tracked) - set(state or {}))
  if missing:
    raise ValueError(
      f"the rule ({rule}) keeps state of {', '.join(missing)} and none came in. With "
      "jaxquant.quantized, put jaxquant.init_quant(model, variables, recipe, inputs) under 'quant' "
      "in the variables (for static ranges what jaxquant.prepare.prepare or quantize_params gives "
      "with calibration batches), and list 'quant' in the variable_axes of nn.scan."
    )
  words = fold(key, 0) if rule.needs_key else None
  kept = {name: state[name] for name in tracked} if state else {}
  return _qdot(rule, x, w, words, kept)


def _check_packed(w: QTensor, rule: Rule) -> None:
  if rule.w.fmt is not None and w.fmt != rule.w.fmt:
    raise ValueError(f"the weight is packed as {w.fmt}, the rule says {rule.w.fmt}")
  if rule.x.rotation is not None and rule.x.rotation.random:
    raise ValueError("a packed weight cannot follow a random rotation of x; fix its signs")
  if rule.patch is not None:
    raise ValueError(
      "a packed weight has lost the residual that the patch adds again; decode under "
      "jaxquant.without_state(recipe), or keep the weight in float"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _qdot(
  rule: Rule,
  x: jax.Array,
  w: jax.Array | QTensor,
  key: jax.Array | None,
  state: dict[str, State],
) -> jax.Array:
  return _forward(rule, x, w, key, state)[0]


def _forward(
  rule: Rule, x: jax.Array, w: jax.Array | QTensor, key: jax.Array | None, state: dict[str, State]
) -> tuple:
  """Y, the forward operands and what they were made from, rotated."""
  k = _keys(key)[0]
  turned = _turned(x, rule.x, -1, k), w
  xq = _encoded(turned[0], rule.x, -1, k, state=state.get("x"))
  wq = w
  if not isinstance(w, QTensor):
    turned = turned[0], _turned(w, rule.w, -2, k)
    wq = _encoded(turned[1], rule.w, -2, k, rhs=True, state=state.get("w"))
  if rule.patch is None:
    return dispatch.contract(xq, wq, x.dtype), xq, wq, turned
  dot = lambda a, b: dispatch.contract(a, b, x.dtype, out=jnp.float32)
  y = dot(xq, wq) + rule.patch(*turned, xq, wq, state["patch"]["index"], dot)
  return y.astype(x.dtype), xq, wq, turned


def _keys(key: jax.Array | None) -> list:
  return [None] * 3 if key is None else [fold(key, i) for i in range(3)]


def _fwd(
  rule: Rule, x: jax.Array, w: jax.Array | QTensor, key: jax.Array | None, state: dict[str, State]
) -> tuple:
  y, xq, wq, turned = _forward(rule, x, w, key, state)
  keep_x = x if rule.wgrad_x.source is Source.ORIGINAL else _kept(rule, xq)
  keep_w = w if rule.dgrad_w.source is Source.ORIGINAL else _kept(rule, wq)
  # What only an estimator needs; None takes no memory.
  pairs = ((rule.x, turned[0], xq), (rule.w, turned[1], wq))
  estimated = tuple((a, q) if operand.gradient else None for operand, a, q in pairs)
  seen = {n: t.observe(a) for n, t, a in _tracked(rule, turned, ("x", "w"))}
  if rule.patch is not None:
    seen["patch"] = rule.patch.observe(*turned, xq, wq)
  return y, (keep_x, keep_w, _like(x), _like(w), key, state, estimated, seen)


def _kept(rule: Rule, q: jax.Array | QTensor) -> jax.Array | QTensor:
  return pack(q) if rule.keep_packed and isinstance(q, QTensor) else q


def _tracked(rule: Rule, arrays: tuple, names: tuple[str, str]) -> list[tuple]:
  """(name, tracker, array) of those operands whose scales keep state."""
  found = [(name, rule.operands[name].scales, a) for name, a in zip(names, arrays)]
  return [f for f in found if isinstance(f[1], Tracked) and not isinstance(f[2], QTensor)]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Like:
  """What the cotangent of an array must look like."""

  shape: tuple[int, ...]
  dtype: np.dtype


def _like(x: jax.Array | QTensor) -> _Like | QTensor:
  return x if isinstance(x, QTensor) else _Like(x.shape, x.dtype)


def _bwd(rule: Rule, kept: tuple, g: jax.Array) -> tuple:
  x, w, like_x, like_w, key, state, estimated, seen = kept
  k, packed = _keys(key), isinstance(like_w, QTensor)
  forward = packed or rule.dgrad_w.source is Source.FORWARD
  dx, seen_dgrad = _gemm(rule, ("dgrad_g", "dgrad_w"), (g, w), (-1, -1), k[1], state)
  dx = _through(rule.x, dx, forward, -1, k[0], like_x.shape, estimated[0])
  dx = dx.astype(like_x.dtype)
  dkey = None if key is None else np.zeros(key.shape, jax.dtypes.float0)
  if packed:
    dstate = _seen(state, seen | seen_dgrad)
    return dx, jax.tree.map(_no_gradient, like_w), dkey, dstate
  dw, seen_wgrad = _gemm(
    rule, ("wgrad_x", "wgrad_g"), (x, g), (-2, -2), k[2], state, out=jnp.float32
  )
  forward = rule.wgrad_x.source is Source.FORWARD
  dw = _through(rule.w, dw, forward, -2, k[0], like_w.shape, estimated[1])
  return dx, dw.astype(like_w.dtype), dkey, _seen(state, seen | seen_dgrad | seen_wgrad)


def _gemm(
  rule: Rule,
  names: tuple[str, str],
  arrays: tuple,
  axes: tuple[int, int],
  key: jax.Array | None,
  state: dict[str, State],
  out: jnp.dtype | None = None,
) -> tuple[jax.Array, dict]:
  """A backward GEMM of two operands, and what their trackers saw."""
  g = arrays[names[1] == "wgrad_g"]
  arrays = tuple(dequantize(a) if isinstance(a, QTensor) else a for a in arrays)
  operands = tuple(rule.operands[name] for name in names)
  turned = tuple(_turned(a, o, axis, key) for a, o, axis in zip(arrays, operands, axes))
  encoded = [
    _encoded(a, o, axis, key, rhs=i == 1, state=state.get(name))
    for i, (a, o, axis, name) in enumerate(zip(turned, operands, axes, names))
  ]
  seen = {n: t.observe(a) for n, t, a in _tracked(rule, turned, names)}
  dot = functools.partial(dispatch.contract, dtype=g.dtype, axes=Axes(*axes), out=out)
  d = dot(*encoded)
  if names[0] == "wgrad_x" and rule.patch is not None and rule.patch.wgrad:
    index = state["patch"]["index"]
    d = d.at[index].add(rule.patch.rows(*turned, *encoded, index, dot))
  return d, seen


def _through(
  operand: Operand,
  d: jax.Array,
  rotated: bool,
  axis: int,
  key: jax.Array | None,
  shape: tuple[int, int],
  estimated: tuple[jax.Array, QTensor] | None,
) -> jax.Array:
  """A gradient with respect to the quantized operand -> with respect to the operand.

  Args:
    operand: of the forward GEMM.
    d: the gradient.
    rotated: whether d is in the rotated basis of the forward GEMM.
    axis: of the contraction.
    key: of the forward GEMM.
    shape: of the operand.
    estimated: (rotated operand, its QTensor) for an estimator.
  """
  if operand.gradient is not None and estimated is not None:
    d = d if rotated else _turned(d, operand, axis, key)
    d, rotated = operand.gradient(*estimated, d.astype(jnp.float32)), True
  return _unrotated(d, operand.rotation, axis, key, shape) if rotated else d


def _seen(state: dict[str, State], seen: dict[str, jax.Array]) -> dict[str, State]:
  """The cotangent of the state: nothing but the observations."""
  zeros = jax.tree.map(_no_gradient, state)
  return {name: {**zeros[name], "seen": seen.get(name, zeros[name]["seen"])} for name in zeros}


def _no_gradient(a: jax.Array) -> object:
  if jnp.issubdtype(a.dtype, jnp.floating):
    return jnp.zeros_like(a)
  return np.zeros(a.shape, jax.dtypes.float0)


_qdot.defvjp(_fwd, _bwd)
