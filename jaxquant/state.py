"""The collection "quant": what recipes remember from step to step, and what they learn.

    variables = {"params": ..., "quant": init_quant(model, variables, recipe, tokens)}

Each site whose rule has state holds a dict "state" there: one entry per tracker (delayed scales of
an operand, hot channels), "learned" parameters and a "clock" of the steps done. Nothing is written
while the model runs. The gradient with respect to the leaves called "seen" is what this step saw,
the gradient with respect to those under "learned" is their gradient; `split` gives both to
`jax.grad`, `advance` makes the next state. So the state is right wherever gradients are: in loops,
`nn.scan`, `nn.remat`, microbatches (`combine`) and sharded batches, whose maxima and means XLA
takes over all devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant.intercept import Seen, intercepted
from jaxquant.ops.rule import Rule
from jaxquant.recipe import Recipe

Tree = dict
STATE = "state"


def init_quant(model: nn.Module, variables: dict, recipe: Recipe, *args: object) -> Tree:
  """The collection "quant" before the first step; {} for a recipe without state.

  Args:
    model: the Linen module.
    variables: its float variables.
    recipe: whose rules say which site keeps what.
    *args: first inputs of the model; learned quantizers start from what the sites see of them.

  Raises:
    ValueError: if a site's state came out of no scope, which `nn.scan` does silently unless the
      model lists the collection "quant" in its variable_axes.

  Example:
    >>> from jaxquant.formats import E4M3_TENSOR
    >>> from jaxquant.ops.qdot import Operand, Rule
    >>> from jaxquant.ops.tracked import Delayed
    >>> model, x = nn.Dense(4, name="fc"), jnp.ones((2, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> rule = Rule(x=Operand(E4M3_TENSOR, Delayed(history=2)))
    >>> quant = init_quant(model, variables, Recipe(((".*", rule),)), x)
    >>> sorted(quant["state"]), quant["state"]["x"]["history"].tolist()
    (['clock', 'x'], [0.0, 0.0])
  """
  wanted: set[str] = set()

  def visit(module: nn.Module, seen: Seen) -> None:
    rule = recipe.rule(seen.path)
    if seen.call.lookup or not rule.has_state:
      return
    wanted.add(seen.path)
    if module.is_mutable_collection("quant"):  # not so inside a scan that does not list it
      module.put_variable("quant", STATE, _first(rule, seen))

  def run(variables: object, *args: object) -> Tree:
    wanted.clear()
    with intercepted(Recipe(), visit):
      _, found = model.apply(variables, *args, mutable=["quant"])
    return found.get("quant", {})

  if not any(rule.has_state for _, rule in recipe.rules):
    return {}
  found = jax.jit(run)({k: v for k, v in variables.items() if k != "quant"}, *args)
  missing = sorted(wanted - {site for site, _ in sites_of(found)})
  if missing:
    raise ValueError(
      f"no state came out of {missing[:3]}: a lifted transform dropped it. List the collection in "
      "it: nn.scan(..., variable_axes={'params': 0, 'quant': 0}, split_rngs={'params': True, 'sr': "
      "True}), likewise nn.vmap."
    )
  return found


def _first(rule: Rule, seen: Seen) -> Tree:
  """State of a site, with the leading axes of its canonical inputs."""
  w = seen.call.canonical(seen.kernel)

  def one(x: jax.Array, w: jax.Array) -> Tree:
    entries = {n: t.init() for n, t in rule.tracked.items() if n != "patch"}
    if rule.patch is not None:
      entries["patch"] = rule.patch.init(x.shape[-1])
    theta = {} if rule.learned is None else rule.learned.init(w, x)
    if theta:  # an empty dict would be gone after a step, and the step compiled once more
      entries["learned"] = theta
    return entries | {"clock": jnp.zeros((), jnp.int32)}

  for _ in range(seen.call.x.ndim - 2):
    one = jax.vmap(one)
  return one(seen.call.x, w)


def sites_of(quant: Tree, prefix: str = "") -> Iterator[tuple[str, Tree]]:
  """(path, state) of every site."""
  for name, value in quant.items():
    if name == STATE and "clock" in value:
      yield prefix, value
    elif isinstance(value, dict):
      yield from sites_of(value, f"{prefix}/{name}" if prefix else name)


def split(quant: Tree) -> tuple[Tree, Tree]:
  """(leaves to differentiate by: observations and learned parameters, all others)."""
  flat = flatten_dict(quant)
  inside = {path: a for path, a in flat.items() if path[-1] == "seen" or "learned" in path}
  outside = {path: a for path, a in flat.items() if path not in inside}
  return unflatten_dict(inside), unflatten_dict(outside)


def merge(a: Tree, b: Tree) -> Tree:
  """Two parts of a collection as one; where both have a leaf, that of b."""
  return unflatten_dict(flatten_dict(a) | flatten_dict(b))


def learned(quant: Tree) -> Tree:
  """The part that an optimizer trains."""
  flat = flatten_dict(quant)
  return unflatten_dict({path: a for path, a in flat.items() if "learned" in path})


def combine(recipe: Recipe, a: Tree, b: Tree) -> Tree:
  """Gradients by `split(quant)[0]` of two microbatches as one: sums, but for observations."""
  flat, other = flatten_dict(a), flatten_dict(b)

  def one(path: tuple[str, ...]) -> jax.Array:
    if path[-1] != "seen" or "learned" in path:
      return flat[path] + other[path]
    at = len(path) - 1 - path[::-1].index(STATE)
    tracker = recipe.rule("/".join(path[:at])).tracked[path[at + 1]]
    return tracker.combine(flat[path], other[path])

  return unflatten_dict({path: one(path) for path in flat})


def advance(recipe: Recipe, quant: Tree, seen: Tree) -> Tree:
  """The collection of the next step.

  Args:
    recipe: the recipe.
    quant: the collection of this step.
    seen: gradient of the loss by `split(quant)[0]`; its learned part is left to the optimizer.

  Returns:
    The next collection, with the learned parameters as they were.
  """
  flat, observed = flatten_dict(quant), flatten_dict(seen)
  for site, state in sites_of(quant):
    place = (*site.split("/"), STATE)
    clock = state["clock"]
    for name, tracker in recipe.rule(site).tracked.items():
      after = tracker.update(state[name], observed[*place, name, "seen"], clock)
      flat |= {(*place, name, leaf): a for leaf, a in after.items()}
    flat[(*place, "clock")] = clock + 1
  return unflatten_dict(flat)


def carried(old: Tree, fresh: Tree) -> Tree:
  """The collection `fresh` of another recipe, with what `old` remembers in the same form.

  An entry of a site (a tracker's state) is taken over if all its leaves have the same names, shapes
  and dtypes.
  """
  form = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
  known = dict(sites_of(old))
  flat = flatten_dict(fresh)
  for site, state in sites_of(fresh):
    for name, entry in state.items():
      before = known.get(site, {}).get(name)
      if before is not None and form(before) == form(entry):
        flat |= {
          (*site.split("/"), STATE, *path): a for path, a in flatten_dict({name: before}).items()
        }
  return unflatten_dict(flat)


def between_steps(recipe: Recipe | None, quant: Tree, step: int) -> Tree:
  """The collection with learned parameters renewed where that is due; mostly `quant` itself.

  For what happens once in hundreds of steps and has no place in a compiled step, such as the
  factorizations between the phases of a decaying branch (`jaxquant.quantizers.Branch`).

  Args:
    recipe: that of `quant`.
    quant: after an update.
    step: updates done since `init_quant`, as a number of the host: nothing waits for the device.

  Example: a training loop of a recipe that may learn.
    >>> for step in range(steps):  # doctest: +SKIP
    ...   state, metrics = update(state, batch(step))
    ...   state = state.replace(quant=between_steps(recipe, state.quant, step + 1))
  """
  quantizer = lambda site: recipe.rule(site).learned
  found = {site: quantizer(site) for site, _ in sites_of(quant)} if recipe and quant else {}
  due = tuple(sorted(site for site, q in found.items() if q is not None and q.due(step)))
  return _renewed(recipe, due, quant) if due else quant


@functools.partial(jax.jit, static_argnums=(0, 1))
def _renewed(recipe: Recipe, due: tuple[str, ...], quant: Tree) -> Tree:
  states, flat = dict(sites_of(quant)), flatten_dict(quant)
  for site in due:
    renew, theta = recipe.rule(site).learned.renewed, states[site]["learned"]
    for _ in range(states[site]["clock"].ndim):
      renew = jax.vmap(renew)
    after = flatten_dict(renew(theta, states[site]["clock"]))
    flat |= {(*site.split("/"), STATE, "learned", *path): a for path, a in after.items()}
  return unflatten_dict(flat)


def without_state(recipe: Recipe, *, static: bool = True) -> Recipe:
  """The recipe with current scales for delayed ones and no patch: for packed weights.

  Args:
    recipe: any.
    static: whether static ranges stay, which packed weights need; else x has current scales.
  """
  rules = tuple((pattern, rule.without_state(static=static)) for pattern, rule in recipe.rules)
  return recipe.replace(rules=rules)


def value_and_grad(
  loss: Callable[[Tree, jax.Array, Tree], jax.Array], recipe: Recipe | None, accumulate: int = 1
) -> Callable:
  """(variables, batch, rngs) -> (value, gradients of the parameters, of the collection "quant").

  Args:
    loss: (variables, batch [B, ...], rngs) -> scalar.
    recipe: whose state it is; None: there is none.
    accumulate: microbatches that a batch is dealt to, row by row; their mean is the result. Each
      is quantized by itself, with a key of its own.
  """

  def one(variables: Tree, batch: jax.Array, rngs: Tree) -> tuple:
    inside, outside = split(variables.get("quant", {}))

    def of(params: Tree, inside: Tree) -> jax.Array:
      quant = merge(outside, inside)
      return loss({"params": params} | ({"quant": quant} if quant else {}), batch, rngs)

    value, grads = jax.value_and_grad(of, argnums=(0, 1))(variables["params"], inside)
    return value, *grads

  def many(variables: Tree, batch: jax.Array, rngs: Tree) -> tuple:
    if batch.shape[0] % accumulate:
      raise ValueError(f"a batch of {batch.shape[0]} rows cannot be cut into {accumulate}")
    # Every n-th row, so that each part of a sharded batch is on all devices.
    parts = batch.reshape(-1, accumulate, *batch.shape[1:]).swapaxes(0, 1)

    def body(sums: tuple, part: tuple) -> tuple:
      batch, i = part
      keys = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
      value, grads, seen = one(variables, batch, keys)
      total = jax.tree.map(jnp.add, sums[:2], (value, grads))
      return (*total, combine(recipe, sums[2], seen) if seen else seen), None

    start = jax.eval_shape(one, variables, parts[0], rngs)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), start)  # nothing seen is below 0
    (value, grads, seen), _ = jax.lax.scan(body, zeros, (parts, jnp.arange(accumulate)))
    mean = lambda a: a / accumulate
    seen = merge(seen, jax.tree.map(mean, learned(seen)))
    return value / accumulate, jax.tree.map(mean, grads), seen

  return one if accumulate == 1 else many
