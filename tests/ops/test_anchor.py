"""Packed documents: who sees whom, and what an anchor changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.cache import init_cache
from jaxquant.data import pack_documents
from jaxquant.models import Transformer, TransformerShape
from jaxquant.ops.attention import attend, document_mask

LENGTHS = (3, 1, 5)
PACK = np.repeat([1, 2, 3], LENGTHS).astype(np.int32)[None]
ANCHORED = np.pad(PACK, ((0, 0), (1, 0)))


@pytest.mark.parametrize("documents", [ANCHORED, PACK, 0 * PACK, np.array([[0, 1, 0, 2, 1, 2]])])
def test_mask(documents):
  mask = document_mask(jnp.asarray(documents))
  for t, s in np.ndindex(mask.shape[1:]):
    seen = s <= t and documents[0, s] in (0, documents[0, t])
    assert mask[0, t, s] == seen


def test_the_anchor_is_seen_by_all_and_sees_itself():
  mask = np.asarray(document_mask(jnp.asarray(ANCHORED))[0])
  assert mask[:, 0].all()
  assert mask[0].tolist() == [True] + [False] * PACK.size
  blocks = [np.tril(np.ones((n, n), bool)) for n in LENGTHS]
  at = np.cumsum((0, *LENGTHS))
  for block, start in zip(blocks, at):
    inside = slice(1 + start, 1 + start + len(block))
    assert (mask[inside, inside] == block).all()
    assert mask[inside, 1:].sum() == block.sum()  # and no other document


def test_an_anchor_of_value_zero_only_shrinks_attention_within_documents():
  """o_anchor = (1 - p_0) o_within, p_0 being the probability of the anchor: its logit still takes
  its share of the softmax. Equality of the outputs themselves needs p_0 = 0."""
  q, k, v = np.random.default_rng(0).standard_normal((3, 1, 10, 2, 8)).astype(np.float32)
  v[:, 0] = 0
  nobodys = jnp.where(ANCHORED == 0, 99, ANCHORED)
  anchored, within = document_mask(jnp.asarray(ANCHORED)), document_mask(nobodys)
  run = jax.jit(lambda v, mask: attend(q, k, v, mask, scale=0.5))
  o, base = run(v, anchored)[:, 1:], run(v, within)[:, 1:]
  p0 = run(np.zeros_like(v) + (np.arange(10) == 0)[:, None, None], anchored)[:, 1:]
  assert p0.min() > 1e-3
  np.testing.assert_allclose(o, (1 - p0) * base, atol=5e-7)  # a few ulp of values around 1


SHAPE = TransformerShape(
  vocab=17, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16, max_len=16
)


def test_a_pack_without_anchor_is_its_documents_one_by_one():
  """Positions run on over the pack; scores do not notice (float32 angles would, far out)."""
  model, rows = Transformer(SHAPE), np.arange(len(LENGTHS))
  tokens = np.random.default_rng(0).integers(0, SHAPE.vocab, PACK.shape)
  alone = np.zeros((len(LENGTHS), max(LENGTHS)), int)  # padded on the right, where nobody looks
  row, column = np.repeat(rows, LENGTHS), np.concatenate([np.arange(n) for n in LENGTHS])
  alone[row, column] = tokens[0]

  @jax.jit
  def both(positions):
    variables = model.init(jax.random.key(1), tokens)
    packed = model.apply(variables, tokens, documents=jnp.asarray(PACK), positions=positions)
    return packed[0], model.apply(variables, alone)[row, column]

  np.testing.assert_allclose(*both(100_000 + np.arange(PACK.size)[None]), atol=2e-5)


def test_a_cache_holds_no_packs():
  model, tokens = Transformer(SHAPE), jnp.zeros((1, 9), jnp.int32)
  with pytest.raises(ValueError, match="a row of a cache is one document"):
    jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), tokens, cache=init_cache(SHAPE, 1), documents=jnp.asarray(PACK)
      )
    )


def test_packing():
  """Every token is a target once; a cut document is one document still."""
  documents = [np.arange(n) + 10 * n for n in (5, 0, 2, 1, 4)]
  rows = pack_documents(documents, 5, anchor=7)
  assert rows.tokens.shape == rows.documents.shape == (3, 6)
  assert rows.tokens[:, 0].tolist() == [7, 7, 7]
  real = rows.documents[:, 1:] > 0
  np.testing.assert_array_equal(rows.tokens[:, 1:][real], np.concatenate(documents))
  assert rows.documents.tolist() == [
    [0, 1, 1, 1, 1, 1], [0, 3, 3, 4, 5, 5], [0, 5, 5, -1, -1, -1]
  ]  # fmt: skip
  assert rows.trained.tolist() == [
    [True] * 5, [True, True, False, False, True], [True, True, False, False, False]
  ]  # fmt: skip


def test_nothing_is_not_packed():
  with pytest.raises(ValueError, match="1 documents without a token"):
    pack_documents([np.zeros(0, np.int32)], 4)
