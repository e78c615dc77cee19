"""Arrays that were given away: deleted once they are used, as `jax.jit` does with donated ones."""

from __future__ import annotations

import jax
from flax.core import meta


def consume(array: object) -> None:
  """Deletes a jax.Array, so that its memory is free; using it later raises RuntimeError.

  Traced values and arrays of other libraries are left alone, what is deleted already too.
  """
  concrete = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
  if concrete and not array.is_deleted():
    array.delete()


def consume_all(arrays: list) -> None:
  """Deletes the arrays of a list, and empties it."""
  while arrays:
    consume(arrays.pop())


def consume_others(given: object, kept: object) -> None:
  """Deletes the arrays of a tree that are not among those of another."""
  stay = {id(a) for a in jax.tree.leaves(kept)}
  for array in jax.tree.leaves(given):
    if id(array) not in stay:
      consume(array)


def check_unshared(params: object) -> None:
  """Raises ValueError if one array stands for two parameters: it could not be given away twice."""
  found: dict[int, str] = {}
  for path, array in jax.tree_util.tree_leaves_with_path(meta.unbox(params)):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if found.setdefault(id(array), name) != name:
      raise ValueError(
        f"donate: {name} is the same array as {found[id(array)]}, and the first to be packed would "
        "take it from the other. Copy one of them, or call without donate."
      )


@jax.jit
def _unstacked(stack: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(stack[i] for i in range(stack.shape[0]))


def layers_of(stack: jax.Array, donate: bool) -> list[jax.Array]:
  """[L, ...] as L arrays; a donated stack is deleted once they are there."""
  layers = list(jax.block_until_ready(_unstacked(stack)))
  if donate:
    consume(stack)
  return layers
