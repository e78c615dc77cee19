"""Ranges found by their output error: the clip search of AWQ."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxquant.encoding import encode
from jaxquant.formats import Format
from jaxquant.observers import clamped, diagonal_blocks, gram_error, observe
from jaxquant.scales import ScaleRule, default_rule
from jaxquant.tensor import QTensor, block_sizes, to_blocks

RATIOS = tuple(1 - i / 20 for i in range(10))  # the published grid


@functools.partial(jax.jit, static_argnames=("fmt", "rule", "ratios"))
def clip_search(
  w: jax.Array,
  hessian: jax.Array,
  fmt: Format,
  *,
  rule: ScaleRule | None = None,
  ratios: tuple[float, ...] = RATIOS,
) -> QTensor:
  """Round to nearest with the range of each group that costs its partial output least.

      min over p of d^T H_gg d,  d = Q(w_g; range within +-p max|w_g|) - w_g

  arXiv:2306.00978, code; there the error is that of at most 512 sampled tokens, here that of all.

  Args:
    w: [K, N].
    hessian: X^T X, float32 [K, K], of any positive scale; or only its blocks on the diagonal
      [K/block, block, block] (`jaxquant.statistics.block_hessian`), which are all that is read.
    fmt: any Format with one scale per column of a group.
    rule: of the narrowed group; by default the one that the format implies.
    ratios: candidates p.

  Returns:
    QTensor of grid values.

  Example:
    >>> import jax.numpy as jnp, jaxquant as jq
    >>> w, h = jnp.array([[7.0], [1.4], [1.4]]), jnp.diag(jnp.array([0.0, 1.0, 1.0]))
    >>> bool(jnp.allclose(jq.dequantize(clip_search(w, h, jq.formats.INT4))[1:], 1.4))
    True
  """
  w = w.astype(jnp.float32)
  gram = hessian.astype(jnp.float32)
  if gram.ndim == 2:
    gram = diagonal_blocks(gram, block_sizes(fmt, w.shape, -2)[0])
  blocks = to_blocks(jnp.where(jnp.isfinite(w), w, 0), fmt, -2)
  found = observe(
    blocks,
    fmt,
    rule or default_rule(fmt),
    ratios=ratios,
    narrow=clamped,
    error=gram_error(gram),
  )
  return encode(w, fmt, scales=found)
