"""What calibration asks of a model beyond its sites: blocks in order, and its attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxquant.donation import layers_of
from jaxquant.kernels import is_node

Keys = tuple[str, ...]  # of a parameter below its block


@dataclasses.dataclass(frozen=True)
class Blocks:
  """A model as a sequence of blocks.

  Attributes:
    names: module path of each; under `nn.scan` the same one for all.
    stacked: whether the parameters of all lie stacked under that name.
    begin: (variables, batch) -> h, what the first block gets.
    run: (name, parameters of one block, h) -> h.
  """

  names: tuple[str, ...]
  stacked: bool
  begin: Callable[[object, object], jax.Array]
  run: Callable[[str, object, jax.Array], jax.Array]

  def take(self, params: dict, i: int) -> dict:
    """Parameters of block i."""
    part = params[self.names[i]]
    return jax.tree.map(lambda a: a[i], part) if self.stacked else part

  def one_by_one(self, params: dict, donated: Collection[Keys] = ()) -> Iterator[dict]:
    """Parameters of each block, in order; of stacks, those named are consumed.

    They are taken apart one after the other, so that one stack is held twice at a time.

    Args:
      params: of the model, without boxes.
      donated: keys below the name of the block.
    """
    apart, rest = {}, params
    if self.stacked and donated:
      name = self.names[0]
      flat = flatten_dict(params[name], is_leaf=lambda _, a: is_node(a))
      apart = {keys: layers_of(flat[keys], donate=True) for keys in donated}
      rest = {name: unflatten_dict({k: a for k, a in flat.items() if k not in apart})}
    for i in range(len(self.names)):
      part = flatten_dict(self.take(rest, i), is_leaf=lambda _, a: is_node(a))
      yield unflatten_dict(part | {keys: layers.pop(0) for keys, layers in apart.items()})

  def joined(self, parts: dict[str, list[dict]]) -> dict:
    """{name: parameters} of the model from those of each block, which are consumed on the way."""
    if not self.stacked:
      return {name: part for name, (part,) in parts.items()}
    ((name, layers),) = parts.items()
    flat = [flatten_dict(part, is_leaf=lambda _, a: is_node(a)) for part in layers]
    parts.clear()
    layers.clear()
    join = lambda *a: jnp.stack(a)
    return {
      name: unflatten_dict(
        {keys: jax.tree.map(join, *(part.pop(keys) for part in flat)) for keys in tuple(flat[0])}
      )
    }

  def put(self, params: dict, i: int, block: dict) -> dict:
    """The parameters with those of block i replaced."""
    name = self.names[i]
    if self.stacked:
      block = jax.tree.map(lambda a, b: a.at[i].set(b), params[name], block)
    return {**params, name: block}


@functools.singledispatch
def blocks_of(model: nn.Module) -> Blocks:
  """The blocks of a model, from the function registered for its class.

  Raises:
    ValueError: if nobody registered the class.
  """
  raise ValueError(
    f"{type(model).__name__} has no blocks registered, and the recipe goes block by block. "
    "Say what they are:\n"
    "  @jaxquant.model_blocks.blocks_of.register\n"
    f"  def _(model: {type(model).__name__}) -> jaxquant.model_blocks.Blocks: ..."
  )


def has_blocks(model: nn.Module) -> bool:
  """Whether `blocks_of` knows the model."""
  return blocks_of.dispatch(type(model)) is not blocks_of.dispatch(object)


@functools.singledispatch
def attention_statistics(
  model: nn.Module, variables: dict, recipe: object, batches: list
) -> dict[str, object]:
  """An `AttentionStatistic` at every site that the recipe quantizes, summed over batches.

  Raises:
    ValueError: if nobody registered the class.
  """
  del variables, batches
  raise ValueError(
    f"{getattr(recipe, 'name', recipe)}: its statistic sees the attention of each layer, and "
    f"nobody said how {type(model).__name__} attends. Register a function that collects it:\n"
    "  @jaxquant.model_blocks.attention_statistics.register\n"
    f"  def _(model: {type(model).__name__}, variables, recipe, batches): ...  # path: statistic"
  )
