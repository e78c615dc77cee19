"""Models by name: what a config or the metadata of a stored model can ask for."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn

from jaxquant.models.gla import GLA, GLAShape
from jaxquant.models.transformer import Transformer, TransformerShape

ARCHITECTURES = {"transformer": (Transformer, TransformerShape), "gla": (GLA, GLAShape)}


def build(architecture: str, fields: Mapping[str, object]) -> nn.Module:
  """The model of a name, with the sizes that `fields` give to its shape.

  Args:
    architecture: a key of `ARCHITECTURES`.
    fields: of its shape.

  Raises:
    ValueError: for another name.

  Example:
    >>> build("transformer", {"n_layers": 2}).shape.n_layers
    2
  """
  if architecture not in ARCHITECTURES:
    raise ValueError(f"architecture {architecture!r} is none of {sorted(ARCHITECTURES)}")
  model, shape = ARCHITECTURES[architecture]
  return model(shape(**fields))


def architecture_of(model: nn.Module) -> str:
  """The name under which `build` makes it."""
  return next(name for name, (of, _) in ARCHITECTURES.items() if of is type(model))
