"""How a model shows a number from its inside to whoever watches it; nothing if nobody does."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax


def tap(module: nn.Module, name: str, value: Callable[[], dict[str, jax.Array]]) -> None:
  """Leaves `value()` in the collection "taps" of a module, if the caller asked for it.

  Otherwise `value` is not called, so that a model with taps that nobody reads is the same jaxpr as
  one without. `jaxquant.diagnostics.taps` reads them. Layers under `nn.scan` must list "taps" in
  its variable_axes.

  Args:
    module: bound.
    name: of the point, which is the module's path and this.
    value: () -> {measure: scalar}.

  Raises:
    ValueError: if a measure is not a scalar, naming the point.
  """
  if module.is_initializing() or not module.is_mutable_collection("taps"):
    return
  found = value()
  wrong = {k: list(v.shape) for k, v in found.items() if v.ndim}
  if wrong:
    raise ValueError(f"{'/'.join((*module.path, name))}: taps hold scalars, got shapes {wrong}")
  module.put_variable("taps", name, found)
