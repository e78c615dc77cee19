"""Taps: measures of what flows through a model, taken in a run of their own beside training.

A point is a tensor with a name: the path of a site and one of its operands,

    layers/attn/q/x      canonical input, [M, K]
    layers/attn/q/w      weight, as [N, K]
    layers/attn/q/y      output, [M, N]
    layers/attn/q/g      gradient of the loss with respect to the output, [M, N]
    layers/attn_norm/x   input of a norm, [M, K]: the residual stream

Rules say what is measured where, like those of a recipe: (pattern, measures) pairs, the first that
matches the whole name counts. Measures are a function of the tensor that returns {measure: array},
such as `measures.outliers`. Points that a model offers itself (`jaxquant.tapping.tap`) are scalars
and always come, and so does the alignment of its SwiGLUs, `layers/mlp/swiglu`.

The training step is not touched: the same model is run once more, under the interceptor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant import graph
from jaxquant.diagnostics.measures import Measured, alignment, gate_range, outliers, spread
from jaxquant.diagnostics.spectra import spectral
from jaxquant.intercept import Seen, intercepted
from jaxquant.kernels import is_node, to_dense
from jaxquant.recipe import Recipe
from jaxquant.sites import flat_params

Measures = Callable[[jax.Array], Measured]
Rules = tuple[tuple[str, Measures | None], ...]
Loss = Callable[[dict, object, dict], jax.Array]  # (variables, batch, rngs) -> scalar

OUTLIERS: Rules = ((".*/[xwg]", outliers),)  # every input, weight, gradient and residual stream
SPECTRA: Rules = (("(embed|head)/w|.*attn_norm/x|final_norm/x", spectral),)
GATES: Rules = ((".*/gk(/up)?/y", gate_range),)  # of models with gated linear attention


def next_token_loss(apply: Callable) -> Loss:
  """The mean cross entropy of a model of tokens, batch int32 [B, T+1]."""

  def loss(variables: dict, batch: jax.Array, rngs: dict) -> jax.Array:
    logits = apply(variables, batch[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

  return loss


def taps(
  model: nn.Module,
  recipe: Recipe,
  rules: Rules = OUTLIERS,
  loss_of: Callable[[Callable], Loss] = next_token_loss,
) -> Callable:
  """A function (variables, batch, rngs) -> {point: {measure: float32 [L, ...]}}, for jit.

  L are the layers, looped or scanned; 1 outside of them. One forward pass, and one backward pass if
  a rule matches a gradient. Of a site that is used more than once, its first use is measured.

  Args:
    model: the Linen module.
    recipe: how it runs meanwhile; gradients are those of this recipe.
    rules: what to measure where.
    loss_of: apply -> loss, such as `jaxquant.training.from_logits`.

  Raises:
    ValueError: when called, for a pattern that matches no point, and for points whose values did
      not come out because a lifted transform drops the collection "taps".

  Example:
    >>> model, x = nn.Dense(1, use_bias=False), jnp.ones((4, 2))
    >>> rules = (("x|g", lambda a: {"sum": a.sum()}),)
    >>> loss_of = lambda apply: lambda variables, x, _: apply(variables, x).sum()
    >>> measure = taps(model, Recipe(), rules, loss_of)
    >>> found = jax.jit(measure)(model.init(jax.random.key(0), x), x, {})
    >>> {point: values["sum"].tolist() for point, values in found.items()}
    {'g': [4.0], 'x': [8.0]}
  """

  def run(variables: dict, batch: object, rngs: dict) -> dict[str, Measured]:
    visit = _Visit(rules)
    mutable = ["taps", *(name for name in variables if name != "params")]

    def loss(probes: dict) -> tuple[jax.Array, dict]:
      state: list[dict] = []

      def apply(given: dict, *args: object, **kwargs: object) -> object:
        with intercepted(recipe, visit), nn.intercept_methods(visit.norms):
          out, new = model.apply({**given, "taps": probes}, *args, mutable=mutable, **kwargs)
        state.append(new.get("taps", {}))
        return out

      return loss_of(apply)(variables, batch, rngs), state[-1]

    _, found = jax.eval_shape(loss, {})
    visit.check(found)
    probes = {k: jnp.zeros(v.shape, v.dtype) for k, v in flatten_dict(found).items() if _PROBE in k}
    gradients, found = jax.grad(loss, has_aux=True)(unflatten_dict(probes))
    found = {k: v for k, v in flatten_dict(found).items() if _PROBE not in k}
    for (*path, _, measure), value in flatten_dict(gradients).items():
      found[*path, "g", measure] = value
    return visit.rows(found) | _alignments(model, variables)

  return run


_LOOPED = r"layers_(\d+)/"
_PROBE = "probe"  # zeros whose cotangents are the measures of a site's output gradient


class _Visit:
  """The visit of `intercepted` that measures; it also remembers which points it met."""

  def __init__(self, rules: Rules):
    # Under jit, tensors of one shape share a trace, which halves the time that traces take.
    self.rules = tuple((pattern, None if of is None else jax.jit(of)) for pattern, of in rules)
    self.met: dict[str, bool] = {}  # point -> whether it is measured
    self.ranks: dict[tuple[str, str], int] = {}  # (point, measure) -> axes in one layer

  def __call__(self, module: nn.Module, seen: Seen) -> Callable[[jax.Array], jax.Array] | None:
    call, path = seen.call, seen.path
    weight = lambda: to_dense(seen.kernel) if is_node(seen.kernel) else call.canonical(seen.kernel)
    self.put(module, path, "w", lambda: weight().mT)
    if call.lookup:
      return None
    self.put(module, path, "x", lambda: call.x)

    def then(y: jax.Array) -> jax.Array:
      zeros = jnp.zeros((*call.x.shape[:-1], jax.eval_shape(weight).shape[-1]), y.dtype)
      # `finish` moves axes about and adds a bias: its transpose moves them back.
      self.put(module, path, "y", lambda: jax.vjp(call.finish, zeros)[1](y)[0])
      silent = self.probe(module, path, zeros)
      return y if silent is None else y + jax.jvp(call.finish, (zeros,), (silent,))[1]

    return then

  def norms(self, call: Callable, args: tuple, kwargs: dict, context: object) -> object:
    """The interceptor that measures the inputs of norms."""
    module = context.module
    if isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and context.method_name == "__call__":
      path = "/".join(module.path)
      self.put(module, path, "x", lambda: args[0].reshape(-1, args[0].shape[-1]))
    return call(*args, **kwargs)

  def put(self, module: nn.Module, path: str, operand: str, value: Callable[[], jax.Array]) -> None:
    """Leaves the measures of a tensor in the collection "taps"."""
    measure = self.chosen(path, operand)
    if measure is None or module.has_variable("taps", operand):
      return
    if module.is_mutable_collection("taps"):
      found = measure(jax.lax.stop_gradient(value()))
      module.put_variable("taps", operand, found)

  def probe(self, module: nn.Module, path: str, zeros: jax.Array) -> jax.Array | None:
    """Zeros [..., M, N] to add to a site's output, with the measures of g as cotangent."""
    measure = self.chosen(path, "g")
    if measure is None or module.has_variable("taps", "g"):
      return None
    if not module.has_variable("taps", _PROBE):
      if not module.is_mutable_collection("taps"):
        return None
      found = jax.tree.map(jnp.zeros_like, jax.eval_shape(measure, zeros))
      module.put_variable("taps", _PROBE, found)
    probe = module.get_variable("taps", _PROBE)
    module.put_variable("taps", "g", probe)  # the first use is over
    return _silent(measure, zeros, probe)

  def chosen(self, path: str, operand: str) -> Measures | None:
    """The measures of a point, in float32, over the leading axes of experts too."""
    point = f"{path}/{operand}" if path else operand
    match = next((of for pattern, of in self.rules if re.fullmatch(pattern, point)), None)
    self.met[point] = match is not None
    return None if match is None else functools.partial(self._measured, match, point)

  def _measured(self, of: Measures, point: str, a: jax.Array) -> Measured:
    for _ in range(a.ndim - 2):
      of = jax.vmap(of)
    found = {k: v.astype(jnp.float32) for k, v in of(a).items()}  # cotangents are no integers
    self.ranks |= {(point, k): v.ndim for k, v in found.items()}
    return found

  def check(self, found: dict) -> None:
    """Raises ValueError for rules without points, and for points without values."""
    idle = [p for p, _ in self.rules if not any(re.fullmatch(p, point) for point in self.met)]
    if idle:
      points = "\n  ".join(self.met)
      raise ValueError(f"taps: {idle} matched no point. The points are:\n  {points}")
    there = {"/".join(k[:-1]) for k in flatten_dict(found)}
    missing = sorted(p for p, wanted in self.met.items() if wanted and p not in there)
    if missing:
      raise ValueError(
        f"taps: nothing came out of {missing[:3]}{'...' if len(missing) > 3 else ''}: a lifted "
        "transform dropped it. List the collection: nn.scan(..., variable_axes={'params': 0, "
        "'taps': 0}), or leave the points out by a rule (pattern, None) in front. The head under "
        "`loss_chunk` is such a point; a loss from logits shows it."
      )

  def rows(self, found: dict[tuple[str, ...], jax.Array]) -> dict[str, Measured]:
    """{point: {measure: [L, ...]}} of the flat collection, looped layers put together."""
    parts: dict[tuple[str, str], list] = {}
    for (*path, measure), value in found.items():
      point = "/".join(path)
      rank = self.ranks.get((point, measure), 0)  # those of `tap` are scalars
      value = value.reshape(-1, *value.shape[value.ndim - rank :])
      layers, name = _layer(point)
      parts.setdefault((name, measure), []).append((layers, value))
    rows: dict[str, Measured] = {}
    for (name, measure), values in sorted(parts.items()):
      stacked = [value for _, value in sorted(values, key=lambda pair: pair[0])]
      rows.setdefault(name, {})[measure] = jnp.concatenate(stacked)
    return rows


def _layer(point: str) -> tuple[tuple[int, ...], str]:
  """Layer and point, ((3,), layers/attn/q/x), of a looped layer's layers_3/attn/q/x."""
  return tuple(map(int, re.findall(_LOOPED, point))), re.sub(_LOOPED, "layers/", point)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _silent(measure: Measures, zeros: jax.Array, probe: Measured) -> jax.Array:
  """Zeros; the cotangent of the probe is what `measure` says of the cotangent of the zeros."""
  del measure, probe
  return zeros


def _silent_backward(measure: Measures, _: None, g: jax.Array) -> tuple[jax.Array, Measured]:
  return g, measure(g)


_silent.defvjp(lambda measure, zeros, probe: (zeros, None), _silent_backward)


def _alignments(model: nn.Module, variables: dict) -> dict[str, Measured]:
  """How far gate and up of each SwiGLU point the same way, from the model's graph if it has one."""
  if graph.graph_of.dispatch(type(model)) is graph.graph_of.dispatch(object):
    return {}
  flat = flat_params(variables)
  parts: dict[str, list] = {}
  for link in graph.graph_of(model).links:
    weights = (*link.gates, link.writer)
    if len(weights) != 2 or any(is_node(flat[w.keys]) for w in weights):
      continue
    cosines = alignment(*(graph.matrix(flat, w) for w in weights))
    name = _layer(link.writer.site)[1].rpartition("/")[0] + "/swiglu"
    parts.setdefault(name, []).append(cosines.reshape(-1, cosines.shape[-1]))
  summary = jax.vmap(lambda cosines: spread("alignment", jnp.abs(cosines)))
  return {name: summary(jnp.concatenate(found)) for name, found in parts.items()}
