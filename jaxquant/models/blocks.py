"""The decoders block by block, for learners that see one at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxquant.blocks import Blocks, blocks_of
from jaxquant.models import gla, transformer
from jaxquant.models.decoder import Block, DecoderShape, block_names


class _Begin(nn.Module):
  """Tokens -> the residual stream."""

  shape: DecoderShape

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    s = self.shape
    return nn.Embed(s.vocab, s.d_model, s.dtype, s.param_dtype, name="embed")(tokens)


class _One(nn.Module):
  """One block under its own name, so that rules and paths are those of the whole model."""

  shape: DecoderShape
  mixer: type[nn.Module]
  context: Callable  # (shape, tokens [B, T]) -> what the mixer wants
  block: str

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    context = self.context(self.shape, jnp.zeros(h.shape[:2], jnp.int32))
    return Block(self.shape, self.mixer, name=self.block)((h, None), 0, context)[0][0]


@blocks_of.register
def _(model: transformer.Transformer) -> Blocks:
  return _blocks(model.shape, transformer.Attention, transformer.context_of)


@blocks_of.register
def _(model: gla.GLA) -> Blocks:
  return _blocks(model.shape, gla.GatedLinearAttention, gla.context_of)


def _blocks(shape: DecoderShape, mixer: type[nn.Module], context: Callable) -> Blocks:
  names = block_names(shape) * (shape.n_layers if shape.scan else 1)
  one = functools.partial(_One, shape, mixer, context)
  return Blocks(names, shape.scan, functools.partial(_begin, shape), functools.partial(_run, one))


def _begin(shape: DecoderShape, variables: dict, tokens: jax.Array) -> jax.Array:
  embed = {"embed": variables["params"]["embed"]}
  return _Begin(shape).apply({"params": embed}, tokens)


def _run(one: Callable, name: str, params: dict, h: jax.Array) -> jax.Array:
  return one(name).apply({"params": {name: params}}, h)
