"""Small Linen models with scan, remat and cache."""

from jaxquant.models import attention_statistics as _attention  # noqa: F401  registers it
from jaxquant.models import blocks as _blocks  # noqa: F401  registers them
from jaxquant.models.decoder import stack_layers, unstack_layers
from jaxquant.models.gla import GLA, GLAShape
from jaxquant.models.transformer import Transformer, TransformerShape

__all__ = [
  "GLA",
  "GLAShape",
  "Transformer",
  "TransformerShape",
  "stack_layers",
  "unstack_layers",
]
