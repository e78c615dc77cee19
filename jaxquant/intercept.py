"""The Linen interceptor: every registered contraction of a model goes through `qdot`.

Modules are not wrapped, renamed or patched: `quantized(model, recipe)` is an apply function that
enters Flax's own interceptor inside the call, so it works in loops, `nn.scan`, `nn.remat`, `vmap`,
`jit` and from any thread, and every jit cache is keyed by the recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxquant.contraction import Contraction, find, parameter, registered
from jaxquant.estimators import straight_through
from jaxquant.kernels import is_node, matmul, to_dense
from jaxquant.ops.dispatch import explain
from jaxquant.ops.qdot import FLOAT, Operand, Rotation, Rule, qdot, quantize_operand
from jaxquant.recipe import Recipe
from jaxquant.statistics import Statistic, Tree
from jaxquant.tensor import QTensor, block_sizes, dequantize

# Interceptors are invisible to jit caches; a user context is part of every cache key. It holds the
# nesting depth, the recipe and what visits the sites.
_in_force = jax.make_user_context((0, None, None))


@dataclasses.dataclass(frozen=True)
class Seen:
  """One site as it is traced.

  Attributes:
    path: module path joined by "/".
    call: the contraction.
    kernel: array or node, one layer's slice under scan.
    rule: that the recipe gives it.
  """

  path: str
  call: Contraction
  kernel: object
  rule: Rule

  @property
  def in_float(self) -> bool:
    """Whether the module runs as it is."""
    idle = self.rule.w.fmt is None if self.call.lookup else self.rule == FLOAT
    return idle and not is_node(self.kernel)


# What it returns, if anything, gets the site's output and gives what takes its place.
Visit = Callable[[nn.Module, Seen], Callable[[jax.Array], jax.Array] | None]


def quantized(model: nn.Module, recipe: Recipe) -> Callable:
  """`model.apply`, with every contraction done as the recipe says.

  One function for training (float params: fake quantization), PTQ and decode (packed params): the
  outputs are the same bits.

  Args:
    model: an unbound Linen module.
    recipe: hashable; another recipe is another jit cache entry.

  Returns:
    A function with the signature of `model.apply`. Rules with stochastic rounding take their noise
    from `rngs={"sr": key}`.

  Example:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
    >>> model, x = nn.Dense(4), jnp.ones((2, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> jq.quantized(model, jq.Recipe(rules=((".*", jq.weight_only(jq.formats.INT8)),)))(
    ...   variables, x
    ... ).shape
    (2, 4)
  """

  def apply(variables: object, *args: object, **kwargs: object) -> object:
    with intercepted(recipe):
      return model.apply(variables, *args, **kwargs)

  return apply


@contextlib.contextmanager
def intercepted(recipe: Recipe, visit: Visit | None = None) -> Iterator[None]:
  """Within, Linen modules of this thread contract as the recipe says.

  Enter it inside a jitted function, not around it; `quantized` does.

  Args:
    recipe: what to do.
    visit: called at each site while it is traced (tables, statistics, taps).
  """
  depth = _in_force.value[0] + 1

  def interceptor(call: Callable, args: tuple, kwargs: dict, context: object) -> object:
    module, method = context.module, context.method_name
    outer = _in_force.value[0] != depth  # of a model that calls this one: not its business
    if outer or not registered(module) or module.is_initializing():
      return call(*args, **kwargs)
    if method == "setup":
      with _nodes_as_they_are(module):
        return call(*args, **kwargs)
    found = find(module, method, context.orig_method.func, args, kwargs)
    kernel = None if found is None else parameter(module, found.param)
    if kernel is None:  # no contraction, or Linen says that the parameter is missing
      return call(*args, **kwargs)
    path = "/".join(module.path)
    seen = Seen(path, found, kernel, recipe.rule(path))
    then = None if visit is None else visit(module, seen)
    y = call(*args, **kwargs) if seen.in_float else _finished(module, seen)
    return y if then is None else then(y)

  with _in_force((depth, recipe, visit)), nn.intercept_methods(interceptor):
    yield


@contextlib.contextmanager
def _nodes_as_they_are(module: nn.Module) -> Iterator[None]:
  """`self.param` in `setup` (nn.Embed) returns a packed kernel; Linen would compare its shape."""
  scope = module.scope
  declared, outer = scope.param, vars(scope).get("param")

  def param(name: str, *args: object, **kwargs: object) -> object:
    value = scope.get_variable("params", name)
    return meta.unbox(value) if is_node(meta.unbox(value)) else declared(name, *args, **kwargs)

  scope.param = param
  try:
    yield
  finally:
    del scope.param
    if outer is not None:  # scopes can be shared
      scope.param = outer


def _finished(module: nn.Module, seen: Seen) -> jax.Array:
  """What the module returns; errors name the site."""
  try:
    return seen.call.finish(_run(module, seen))
  except ValueError as error:
    raise ValueError(f"{seen.path or type(module).__name__}: {error}") from error


def _run(module: nn.Module, seen: Seen) -> jax.Array:
  """The canonical contraction of a site; vmapped over experts and groups."""
  call, rule, packed = seen.call, seen.rule, is_node(seen.kernel)
  kernel = seen.kernel if packed else call.canonical(seen.kernel)
  if call.lookup:
    return _lookup(kernel, call.x, rule)
  if isinstance(kernel, QTensor) and kernel.shape[-2] != call.x.shape[-1]:
    raise ValueError(
      f"the packed kernel is {list(kernel.shape)}, the input has K={call.x.shape[-1]}: "
      "it was packed for another model"
    )
  key = module.make_rng("sr") if rule.needs_key and module.has_rng("sr") else None
  state = _state(module, rule)
  as_stored = packed and not isinstance(seen.kernel, QTensor)

  def run(x: jax.Array, w: object, key: jax.Array | None, state: dict | None) -> jax.Array:
    dot = lambda x, w: qdot(x, w, _stored(rule, w) if as_stored else rule, key, state)
    if rule.learned is None:
      return matmul(w, x, dot)
    inner = lambda x, w: matmul(w, x, dot)
    return rule.learned(state.get("learned", {}), x, w, inner, state["clock"], key)

  lead = call.x.shape[:-2]
  keys = key if key is None or not lead else jax.random.split(key, lead)
  for _ in lead:
    axes = (0, 0, *(None if a is None else 0 for a in (key, state)))
    run = jax.vmap(run, in_axes=axes)
  return run(call.x, kernel, keys, state)


def _state(module: nn.Module, rule: Rule) -> dict | None:
  """What the collection "quant" holds for a site."""
  if not rule.has_state:
    return None
  if module.has_variable("quant", "state"):
    return module.get_variable("quant", "state")
  if rule.learned is None:
    return None  # qdot says what is missing
  raise ValueError(
    f"the rule ({rule}) has parameters and none came in: put jaxquant.init_quant(model, variables, "
    "recipe, inputs) under 'quant' in the variables, and list 'quant' in the variable_axes of "
    "nn.scan"
  )


def _stored(rule: Rule, w: jax.Array | QTensor) -> Rule:
  """The rule for a part of a composed kernel: it stays as the solver left it."""
  fmt = w.fmt if isinstance(w, QTensor) else None
  return dataclasses.replace(rule, w=Operand(fmt, rotation=rule.w.rotation))


def _lookup(kernel: object, ids: jax.Array, rule: Rule) -> jax.Array:
  """Rows of an embedding, [T, features]: columns of its canonical [features, vocabulary]."""
  if rule.w.rotation is not None:
    raise ValueError("a lookup contracts nothing, so nothing undoes the rotation of its rule")
  if is_node(kernel):
    return _rows(kernel, ids)
  found = _rows(quantize_operand(kernel, rule.w, -2), ids)
  return straight_through(_rows(kernel, ids), jax.lax.stop_gradient(found))


def _rows(kernel: object, ids: jax.Array) -> jax.Array:
  """Columns `ids` of a kernel [K, N] as rows [T, K]; like Linen's, NaN where there is none."""
  n = jax.eval_shape(to_dense, kernel).shape[-1]
  ids = jnp.where(ids < 0, ids + n, ids)
  if isinstance(kernel, QTensor):
    found = dequantize(columns(kernel, ids))
  else:
    found = jnp.take(to_dense(kernel), ids, axis=-1, mode="clip")
  return jnp.where((ids >= 0) & (ids < n), found, jnp.nan).T


def columns(q: QTensor, index: jax.Array) -> QTensor:
  """Columns of q [K, N] as a QTensor [K, T], without decoding the others.

  Args:
    q: two-dimensional, packed or not.
    index: int [T].
  """
  size = block_sizes(q.fmt, q.shape, q.axis)[-1]
  take = lambda a, i: jnp.take(a, i, axis=-1, mode="clip")
  if size == q.shape[-1]:  # all columns share their levels
    data = jax.tree.map(lambda a: take(a, index), q.data)
    return q.replace(data=data, fmt=dataclasses.replace(q.fmt, block_n=None))
  block = index // size
  nested = isinstance(q.scale, QTensor)
  scale = columns(q.scale, block) if nested else take(q.scale, block)
  fmt = dataclasses.replace(q.fmt, block_n=1, scale=scale.fmt if nested else q.fmt.scale)
  return q.replace(
    data=jax.tree.map(lambda a: take(a, index), q.data),
    scale=scale,
    zero_point=jax.tree.map(lambda a: take(a, block), q.zero_point),
    offset=None if q.offset is None else take(q.offset, block),
    fmt=fmt,
  )


def collect(
  model: nn.Module,
  recipe: Recipe,
  statistic: Statistic,
  paths: frozenset[str] | None = None,
) -> Callable:
  """A function (variables, *args) -> {path: statistic of its inputs}, for jit.

  Under `nn.scan` the statistics of a site are stacked [L, ...].

  Args:
    model: the Linen module.
    recipe: how the model runs meanwhile (`Recipe()`: in float).
    statistic: what to compute of the canonical x [M, K], rotated if the site's rule rotates it.
    paths: only these sites, so that not all statistics are held at once; None: all.

  Raises:
    ValueError: when called, if a site gave nothing, which `nn.scan` does silently unless the model
      lists the collection "calib" in its variable_axes.
  """

  def chosen(path: str) -> Statistic | None:
    if paths is not None and path not in paths:
      return None
    return rotated(statistic, recipe.rule(path).x.rotation)

  return collect_each(model, recipe, chosen)


def collect_each(
  model: nn.Module, recipe: Recipe, statistic: Callable[[str], Statistic | None]
) -> Callable:
  """`collect` with a statistic of its own for every path; None where none is wanted."""
  wanted: dict[str, bool] = {}

  def put(module: nn.Module, path: str, more: Callable[[Tree | None], Tree]) -> None:
    wanted[path] = True
    if module.is_mutable_collection("calib"):  # not so inside a scan that does not list it
      seen = module.has_variable("calib", "statistic")
      value = more(module.get_variable("calib", "statistic") if seen else None)
      module.put_variable("calib", "statistic", value)

  def run(variables: object, *args: object) -> dict[str, jax.Array]:
    wanted.clear()
    with intercepted(recipe, observer(statistic, put)):
      _, state = model.apply(variables, *args, mutable=["calib"])
    found = dict(_flatten(state.get("calib", {})))
    missing = sorted(set(wanted) - set(found))
    if missing:
      raise ValueError(
        f"no statistics came out of {missing[:3]}{'...' if len(missing) > 3 else ''}: a lifted "
        "transform dropped them. List the collection in it: nn.scan(..., variable_axes={'params': "
        "0, 'calib': 0}, split_rngs={'params': True, 'sr': True}), likewise nn.vmap."
      )
    return found

  return run


def observer(
  statistic: Callable[[str], Statistic | None],
  put: Callable[[nn.Module, str, Callable[[Tree | None], Tree]], None],
) -> Visit:
  """A visit that hands to `put` how the inputs of a site enter its statistic.

  Args:
    statistic: path -> what to compute of x [M, K], or None.
    put: gets (module, path, more), once for every use of the site; more(partial result so far, or
      None) is the partial result with these inputs.
  """

  def visit(module: nn.Module, seen: Seen) -> None:
    chosen = None if seen.call.lookup else statistic(seen.path)
    if chosen is None:
      return
    x, of, onto = seen.call.x, chosen.of, chosen.onto
    for _ in range(x.ndim - 2):
      of, onto = jax.vmap(of), jax.vmap(onto)
    put(module, seen.path, lambda partial: of(x) if partial is None else onto(partial, x))

  return visit


@functools.cache  # one object per rotation: statistics are compared by their functions
def rotated(statistic: Statistic, rotation: Rotation | None) -> Statistic:
  """The statistic of the x that a kernel with this rotation meets."""
  if rotation is None:
    return statistic
  turn = lambda x: quantize_operand(x, Operand(rotation=rotation), -1)
  of, add = lambda x: statistic.of(turn(x)), lambda partial, x: statistic.onto(partial, turn(x))
  return dataclasses.replace(statistic, of=of, add=add)


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, jax.Array]]:
  for name, value in tree.items():
    if name == "statistic" and not isinstance(value, dict):
      yield prefix, value
    else:
      yield from _flatten(value, f"{prefix}/{name}" if prefix else name)


def explain_site(seen: Seen) -> str:
  """Which implementation a site takes, and why."""
  if seen.call.lookup:
    return "lookup: columns are decoded one by one"
  x = jax.ShapeDtypeStruct(seen.call.x.shape[-2:], seen.call.x.dtype)
  key, rule = jax.random.key(0), seen.rule.without_state(static=False)  # the path is that
  encode = lambda a, operand, axis: jax.eval_shape(
    lambda a: quantize_operand(a, operand, axis, key), a
  )
  if is_node(seen.kernel) and not isinstance(seen.kernel, QTensor):
    return f"{type(seen.kernel).__name__}: term by term"
  lhs = encode(x, rule.x, -1)
  if isinstance(seen.kernel, QTensor):
    kernel = seen.kernel
    for _ in range(kernel.ndim - 2):
      kernel = jax.eval_shape(lambda k: jax.tree.map(lambda a: a[0], k), kernel)
    return explain(lhs, kernel)
  w = jax.eval_shape(seen.call.canonical, seen.kernel)
  w = jax.ShapeDtypeStruct(w.shape[-2:], w.dtype)
  return explain(lhs, encode(w, rule.w, -2))
