"""Scales between a norm and its readers that are learned with the quantized weights of a block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxquant.graph import Graph, Keys, Norm, gain_of
from jaxquant.sites import Site

CHANNELS = "channels"  # theta's name


@dataclasses.dataclass(frozen=True)
class LearnScales:
  """OmniQuant's learnable equivalent transformation, its scales; arXiv:2308.13137, section 3.3.

      gain / s, w * s of all weights that read the norm;  s = exp(theta), theta from 0

  `BlockSolve.scales` learns it with what it learns of the weights and stores both. The start is
  what the recipe's steps have made of the weights: behind `Smooth()` that of SmoothQuant, as in the
  paper. Its shift is for models with biases, and its scale between q and k is not here. A norm
  takes part if all its readers are quantized, without a rotation of the weight alone.

  Attributes:
    learning_rate: of theta, so relative to the scale; the paper's is that of s.
  """

  learning_rate: float = 5e-3

  def norms(self, graph: Graph, block: str, learned: Mapping[Keys, Site]) -> tuple[Norm, ...]:
    """Those of a block that take part, with paths below it.

    Args:
      graph: of the model.
      block: its name.
      learned: sites of the block that are learned, by their keys below it.
    """
    below = lambda site: site.removeprefix(f"{block}/")
    found = []
    for norm in graph.norms:
      if norm.site.startswith(f"{block}/") and not graph.tied(norm):
        readers = tuple(dataclasses.replace(r, site=below(r.site)) for r in norm.readers)
        plain = lambda r: r.keys in learned and learned[r.keys].rule.w.rotation is None
        if all(map(plain, readers)):
          found.append(dataclasses.replace(norm, site=below(norm.site), readers=readers))
    return tuple(found)

  def start(self, norms: tuple[Norm, ...], params: dict[Keys, jax.Array]) -> dict[Keys, dict]:
    """The theta of each norm: scales of one."""
    return {norm.keys: {CHANNELS: jnp.zeros(params[norm.keys].shape)} for norm in norms}

  def fold(
    self,
    norms: tuple[Norm, ...],
    theta: dict[Keys, dict],
    params: dict[Keys, jax.Array],
    weights: dict[Keys, jax.Array],
  ) -> tuple[dict[Keys, jax.Array], dict[Keys, jax.Array]]:
    """Gains (and biases of norms) divided by s among `params`, rows times s among `weights`.

    Args:
      norms: from `norms`.
      theta: of each norm at least.
      params: of the block, by keys; gains [K].
      weights: float weights [..., K, N], by keys.
    """
    params, weights = dict(params), dict(weights)
    for norm in norms:
      s = jnp.exp(theta[norm.keys][CHANNELS])
      gain, bias = params[norm.keys], (*norm.keys[:-1], "bias")
      params[norm.keys] = (gain_of(params, norm) / s - norm.offset).astype(gain.dtype)
      if bias in params:
        params[bias] = (params[bias] / s).astype(params[bias].dtype)
      for reader in norm.readers:
        weights[reader.keys] = weights[reader.keys] * s[:, None]
    return params, weights
