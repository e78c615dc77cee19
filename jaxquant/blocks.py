"""Learning block by block: a window of blocks slides over a model.

Models say what their blocks are with `blocks_of`; a recipe whose `solve` is a `BlockSolve` says
what is learned. Letters: B calibration batches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from jaxquant.graph import Graph, graph_of
from jaxquant.intercept import intercepted
from jaxquant.kernels import Sum, is_node, pack_kernel, to_dense
from jaxquant.model_blocks import Blocks, blocks_of
from jaxquant.prepare import prepare
from jaxquant.ptq import quantize_params
from jaxquant.recipe import Recipe, Solve
from jaxquant.reconstruct import STEPS, Loss, Problem, Steps, mse, reconstruct
from jaxquant.sites import Site, sites
from jaxquant.solvers.learned_rounding import Clipping, Learner
from jaxquant.solvers.rtn import rtn
from jaxquant.solving import canonical
from jaxquant.state import without_state
from jaxquant.steps.equivalent import CHANNELS, LearnScales


@dataclasses.dataclass(frozen=True)
class BlockSolve:
  """A `Recipe.solve` that learns block by block; `quantize_blocks` runs it.

  Attributes:
    learner: what is learned of each weight.
    begin: the solver that gives the kernels to start from.
    loss: of a window's output.
    both: also ask the quantized window for the float window's output on the same, quantized inputs
      (the second term of OmniQuant's aug_loss and of PTQ1.61).
    plan: how long, per window.
    window: blocks learned together.
    overlap: blocks that the next window learns again.
    scales: between norms and their readers, learned with ranges (`Clipping`); None: they stay.
  """

  learner: Learner
  begin: Solve = rtn
  loss: Loss = mse
  both: bool = False
  plan: Steps = STEPS
  window: int = 1
  overlap: int = 0
  scales: LearnScales | None = None

  def __post_init__(self) -> None:
    """Raises ValueError for an overlap that never moves on; for scales another learner ignores."""
    if not 0 <= self.overlap < self.window or not 1 <= self.plan.checks <= self.plan.steps:
      raise ValueError(
        f"BlockSolve wants 0 <= overlap < window and 1 <= checks <= steps, got {self}"
      )
    if self.scales is not None and not isinstance(self.learner, Clipping):
      raise ValueError(
        f"BlockSolve: learned scales move the weights, and {type(self.learner).__name__} keeps to "
        "those it started from; take Clipping, or scales=None"
      )

  def windows(self, blocks: int) -> list[tuple[int, ...]]:
    """Which blocks are learned together, in order."""
    stride = self.window - self.overlap
    firsts = range(0, max(blocks - self.overlap, 1), stride)
    return [tuple(range(i, min(i + self.window, blocks))) for i in firsts]

  @property
  def __name__(self) -> str:
    """For tables."""
    return f"{type(self.learner).__name__} by windows of {self.window}"

  def __call__(self, w: jax.Array, statistic: object, fmt: object, **options: object) -> object:
    """Raises ValueError: a block cannot be learned one site at a time."""
    raise ValueError(
      f"this recipe learns block by block ({self.__name__}), not site by site: call quantize_params"
    )

  def quantize_params(self, *args: object, **kwargs: object) -> dict:
    """`quantize_blocks`; what `jaxquant.quantize_params` does with such a recipe."""
    return quantize_blocks(*args, **kwargs)


Keys = tuple[str, ...]  # of a parameter below its block


class _Block(NamedTuple):
  """What is given of one block.

  Attributes:
    params: {keys: parameter} of all that is not quantized.
    weights: {keys: float weight [..., K, N]}.
    kernels: {keys: kernel of the start solver}.
  """

  params: dict[Keys, jax.Array]
  weights: dict[Keys, jax.Array]
  kernels: dict[Keys, object]


def quantize_blocks(
  model: nn.Module,
  variables: object,
  recipe: Recipe,
  batches: Iterable,
  *,
  progress: bool = True,
) -> dict:
  """The variables with every kernel that the recipe quantizes packed, learned block by block.

  Window after window: its float blocks on float inputs make the targets, its quantized blocks run
  on what the finished quantized blocks before it give. The inputs, the targets and one window of
  weights are held at a time. Sites outside the blocks stay as the start solver left them.

  Args:
    model: with `blocks_of` registered.
    variables: float variables.
    recipe: whose solve is a `BlockSolve`.
    batches: calibration inputs of one shape.
    progress: show a bar over the windows.

  Returns:
    Variables of the same structure whose quantized kernels are packed nodes.

  Raises:
    ValueError: no batches, or of several shapes; a window whose loss is not finite, by name.
  """
  solve, batches = recipe.solve, list(batches)
  shapes = sorted({np.shape(b) for b in batches})
  if len(shapes) != 1:
    raise ValueError(
      f"quantize_blocks: recipe {recipe.name!r} learns from batches of one shape, got {shapes}"
    )
  blocks = blocks_of(model)
  variables = prepare(model, variables, recipe, batches)
  start = recipe.replace(solve=solve.begin, prepare=())
  packed = quantize_params(model, variables, start, batches, progress=False)
  table = sites(model, variables, batches[0], recipe=recipe).quantized()
  running = without_state(recipe, static=False)  # blocks run without the collection "quant"
  run = _Windows(blocks, running, table, None if solve.scales is None else graph_of(model))
  state = run.inputs(variables, packed, jnp.stack(batches))
  theta: dict[int, dict] = {}
  for window in tqdm(solve.windows(len(blocks.names)), recipe.name, disable=not progress):
    given = {i: run.block(variables, packed, i) for i in window}
    begin = [theta.get(i) or run.start(blocks.names[i], given[i]) for i in window]
    found, losses = run.solve(variables, window, begin, tuple(given.values()), state)
    if not bool(jnp.isfinite(losses).all()):
      raise ValueError(
        f"{recipe.name}: the loss of block {window[0]} ({blocks.names[window[0]]}) is not finite: "
        f"{losses.tolist()}. Look for NaN in its inputs, or lower the learning rate."
      )
    theta = dict(zip(window, found))
    done = window if window[-1] == len(blocks.names) - 1 else window[: len(window) - solve.overlap]
    for i in done:
      params = run.finish(blocks.names[i], theta[i], given[i])
      packed = {**packed, "params": blocks.put(packed["params"], i, params)}
      state = run.advance(i, variables, params, state)
  return packed


class _Windows:
  """The functions of `quantize_blocks` for one model and recipe, compiled once per block name."""

  def __init__(
    self, blocks: Blocks, recipe: Recipe, table: tuple[Site, ...], graph: Graph | None
  ) -> None:
    self.blocks, self.recipe, self.learner = blocks, recipe, recipe.solve.learner
    self.sites = {
      name: {s.keys[len(name.split("/")) :]: s for s in table if s.path.startswith(f"{name}/")}
      for name in dict.fromkeys(blocks.names)
    }
    scales = recipe.solve.scales
    self.norms = {n: scales.norms(graph, n, s) for n, s in self.sites.items()} if scales else {}
    self.in_float = jax.jit(self._in_float, static_argnums=0)
    self.quantized = jax.jit(self._quantized, static_argnums=0)
    self.start = jax.jit(self._start, static_argnums=0)
    self.finish = jax.jit(self._finish, static_argnums=0)
    self.problem = functools.cache(self._problem)

  def _in_float(self, name: str, params: dict, xs: jax.Array) -> jax.Array:
    return jax.lax.map(lambda x: self.blocks.run(name, params, x), xs)

  def _quantized(self, name: str, params: dict, xs: jax.Array) -> jax.Array:
    with intercepted(self.recipe):
      return self._in_float(name, params, xs)

  def inputs(self, variables: dict, packed: dict, batches: jax.Array) -> tuple:
    """What the first block gets, [B, ...], from the float and from the quantized model."""

    def begin(variables: dict) -> jax.Array:
      return jax.lax.map(lambda batch: self.blocks.begin(variables, batch), batches)

    def quantized(variables: dict) -> jax.Array:
      with intercepted(self.recipe):
        return begin(variables)

    return jax.jit(begin)(variables), jax.jit(quantized)(packed)

  def block(self, variables: dict, packed: dict, i: int) -> _Block:
    """Block i of both."""
    mine = self.sites[self.blocks.names[i]]
    before = _flat(self.blocks.take(variables["params"], i))
    after = _flat(self.blocks.take(packed["params"], i))
    one = lambda keys: dataclasses.replace(mine[keys], stack=())
    return _Block(
      {keys: a for keys, a in after.items() if keys not in mine},
      {keys: canonical(one(keys), before[keys]) for keys in mine},
      {keys: after[keys] for keys in mine},
    )

  def _start(self, name: str, given: _Block) -> dict:
    """The theta of each site, and of each norm whose scales are learned."""
    norms, scales = self.norms.get(name), self.recipe.solve.scales
    return (scales.start(norms, given.params) if norms else {}) | {
      keys: _mapped(self.learner.start, w)(w, given.kernels[keys])
      for keys, w in given.weights.items()
    }

  def moved(self, name: str, theta: dict, given: _Block) -> _Block:
    """A block whose learned scales are in its gains and weights."""
    if not self.norms.get(name):
      return given
    fold = self.recipe.solve.scales.fold
    params, weights = fold(self.norms[name], theta, given.params, given.weights)
    return given._replace(params=params, weights=weights)

  def _finish(self, name: str, theta: dict, given: _Block) -> dict:
    """Packed parameters of a block."""
    given = self.moved(name, theta, given)
    stored = {
      keys: pack_kernel(_mapped(self.learner.finish, w)(theta[keys], w, given.kernels[keys]))
      for keys, w in given.weights.items()
    }
    return unflatten_dict(given.params | stored)

  def advance(self, i: int, variables: dict, packed: dict, state: tuple) -> tuple:
    """Both inputs of block i + 1 from those of block i."""
    name, params = self.blocks.names[i], self.blocks.take(variables["params"], i)
    return self.in_float(name, params, state[0]), self.quantized(name, packed, state[1])

  def solve(
    self, variables: dict, window: tuple[int, ...], begin: list, given: tuple, state: tuple
  ) -> tuple[list, jax.Array]:
    """The best theta of each block of a window, and the losses on the way."""
    names = tuple(self.blocks.names[i] for i in window)

    def target(x: jax.Array) -> jax.Array:
      for name, i in zip(names, window):
        x = self.in_float(name, self.blocks.take(variables["params"], i), x)
      return x

    both = self.recipe.solve.both
    targets = (target(state[0]), target(state[1])) if both else (target(state[0]),)
    inputs = (state[1],) * len(targets)
    plan = self.recipe.solve.plan
    return reconstruct(self.problem(names), plan, begin, given, inputs, targets)

  def _problem(self, names: tuple[str, ...]) -> Problem:
    learner = self.learner

    def through(kernel_of: Callable) -> Callable:
      def run(theta: list, given: tuple, x: jax.Array) -> jax.Array:
        for name, t, g in zip(names, theta, given):
          g = self.moved(name, t, g)
          of = lambda w, t, kernel: _mapped(kernel_of, w)(t, w, kernel)
          dense = {k: Sum((of(w, t[k], g.kernels[k]),)) for k, w in g.weights.items()}
          with intercepted(self.recipe):
            x = self.blocks.run(name, unflatten_dict(g.params | dense), x)
        return x

      return run

    def penalty(theta: list, given: tuple, progress: jax.Array) -> jax.Array:
      of = lambda w, t, kernel: _mapped(learner.penalty, w, None)(t, w, kernel, progress).mean()
      pairs = zip(theta, given)
      return sum(of(w, t[k], g.kernels[k]) for t, g in pairs for k, w in g.weights.items())

    hard = lambda theta, w, kernel: to_dense(learner.finish(theta, w, kernel))
    scales = self.recipe.solve.scales
    rate = lambda name: scales.learning_rate if name == CHANNELS else learner.rate(name)
    rates = lambda theta: jax.tree.map_with_path(lambda path, _: rate(path[-1].key), theta)
    return Problem(through(learner.dense), through(hard), penalty, rates, self.recipe.solve.loss)


def _flat(params: dict) -> dict[Keys, object]:
  """By keys; kernel nodes stay whole."""
  return flatten_dict(params, is_leaf=lambda _, a: is_node(a))


def _mapped(f: Callable, w: jax.Array, *fixed: None) -> Callable:
  """F over the axes of w before [K, N] (experts, groups); `fixed` arguments come last."""
  for _ in range(w.ndim - 2):
    f = jax.vmap(f, in_axes=(0, 0, 0, *fixed) if fixed else 0)
  return f
