"""Decoding: batches, caches and packed weights change nothing about the tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import recipes
from jaxquant.decode import complete, make_decoder, pad_prompts, sample
from jaxquant.models import Transformer, TransformerShape
from jaxquant.transform_gates import w4a4

SHAPE = TransformerShape(
  vocab=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, max_len=48
)
MODEL = Transformer(SHAPE)
FORWARD = jax.jit(MODEL.apply)
KEY = jax.random.key(7)
PROMPTS = [np.arange(5) + 3, np.array([9]), np.arange(11) * 5 % 64]


@pytest.fixture(scope="module")
def variables():
  params = jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  # Far from uniform logits, so that no argmax is decided by the order of a sum.
  return jax.tree.map(lambda p: p * 3, params)


def same(a, b):
  assert [x.tolist() for x in a] == [x.tolist() for x in b]


def test_greedy_is_the_argmax_of_the_full_forward(variables):
  decoder = make_decoder(MODEL.apply, SHAPE, 12)
  got = complete(decoder, variables, PROMPTS, KEY)
  for prompt, tokens in zip(PROMPTS, got):
    text = np.concatenate([prompt, tokens])
    padded = np.pad(text[:-1], (0, 24 - len(text)))[None]  # causal: padding changes nothing
    logits = FORWARD(variables, padded)[0, : len(text) - 1]
    assert tokens.tolist() == logits.argmax(-1)[len(prompt) - 1 :].tolist()


@pytest.mark.parametrize("recipe", [None, "w4a16_rtn"])
def test_ragged_prompts_are_each_as_alone(variables, recipe):
  apply = MODEL.apply if recipe is None else jq.quantized(MODEL, recipes.by_name(recipe))
  decoder = make_decoder(apply, SHAPE, 8)
  together = complete(decoder, variables, PROMPTS, KEY)
  alone = [complete(decoder, variables, [p], KEY)[0] for p in PROMPTS[:2]]
  same(together[:2], alone)


def test_static_scales_decode_each_prompt_as_alone(variables):
  """The tensor scale of NVFP4 activations is the calibrated one, whoever shares the batch."""
  tokens, _ = pad_prompts(PROMPTS)
  packed = jq.quantize_params(MODEL, variables, w4a4(jq.Static()), [tokens], progress=False)
  decoder = make_decoder(jq.quantized(MODEL, w4a4(jq.Static())), SHAPE, 8)
  together = complete(decoder, packed, PROMPTS, KEY)
  same(together[:2], [complete(decoder, packed, [p], KEY)[0] for p in PROMPTS[:2]])


def test_a_row_draws_the_same_tokens_whoever_its_neighbours_are(variables):
  decoder = make_decoder(MODEL.apply, SHAPE, 8, temperature=1.0)
  same(
    complete(decoder, variables, PROMPTS[:2], KEY), complete(decoder, variables, PROMPTS, KEY)[:2]
  )


def test_the_key_is_all_the_randomness(variables):
  decoder = make_decoder(MODEL.apply, SHAPE, 8, temperature=1.0, top_k=20, top_p=0.9)
  first, again = (complete(decoder, variables, PROMPTS, KEY) for _ in range(2))
  other = complete(decoder, variables, PROMPTS, jax.random.key(8))
  same(first, again)
  assert any(a.tolist() != b.tolist() for a, b in zip(first, other))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["w8a8_int8", "nvfp4"])
def test_packed_weights_decode_the_tokens_of_fake_quant(variables, recipe):
  recipe = recipes.by_name(recipe)
  packed = jq.quantize_params(
    MODEL, variables, recipe, example=jnp.zeros((1, 4), jnp.int32), progress=False
  )
  decoder = make_decoder(jq.quantized(MODEL, recipe), SHAPE, 8, temperature=1.0)
  same(complete(decoder, packed, PROMPTS, KEY), complete(decoder, variables, PROMPTS, KEY))
  tokens, lengths = pad_prompts(PROMPTS)
  logits = [decoder.prefill(v, tokens, lengths)[0] for v in (variables, packed)]
  np.testing.assert_array_equal(*logits)


def test_a_stop_token_ends_its_row_only(variables):
  free = complete(make_decoder(MODEL.apply, SHAPE, 10), variables, PROMPTS, KEY)
  stop = int(free[0][3])
  stopped = complete(make_decoder(MODEL.apply, SHAPE, 10, stop=stop), variables, PROMPTS, KEY)
  for tokens, cut in zip(free, stopped):
    hits = np.flatnonzero(tokens == stop)
    expected = tokens[: hits[0] + 1] if len(hits) else tokens
    assert cut.tolist() == expected.tolist()
  assert len(stopped[0]) <= 4


def test_a_bf16_cache_and_an_unrolled_model_decode(variables):
  shape = dataclasses.replace(SHAPE, dtype=jnp.bfloat16, scan=False)
  model = Transformer(shape)
  unrolled = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  out = complete(make_decoder(model.apply, shape, 4), unrolled, PROMPTS, KEY)
  assert [len(tokens) for tokens in out] == [4, 4, 4]


LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
    ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
    ({"temperature": 1.0, "top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
    ({"temperature": 1.0, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
    ({"temperature": 1.0, "top_p": 0.39}, [1, 0, 0, 0]),
    ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),  # .4+.3 of .9 is .78
    ({"temperature": 0.0}, [1, 0, 0, 0]),
  ],
)
def test_distributions(arguments, expected):
  n = 20_000
  keys = jax.random.split(jax.random.key(1), n)
  tokens = jax.vmap(lambda key: sample(LOGITS, key, **arguments))(keys)
  found = np.bincount(tokens, minlength=4) / n
  # 4 standard deviations of a share of n draws; what was cut off never appears.
  np.testing.assert_allclose(found, expected, atol=4 * 0.5 / n**0.5)
  assert not found[np.array(expected) == 0].any()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": 1.0, "top_k": 0}, "top_k"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
  ],
)
def test_impossible_sampling_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    sample(LOGITS, KEY, **arguments)
  with pytest.raises(ValueError, match=message):
    make_decoder(MODEL.apply, SHAPE, 4, **arguments)


def test_too_long_and_empty_prompts_are_refused(variables):
  with pytest.raises(ValueError, match="max_len is 48"):
    complete(make_decoder(MODEL.apply, SHAPE, 40), variables, PROMPTS, KEY)
  with pytest.raises(ValueError, match="at least one token"):
    pad_prompts([np.arange(3), np.arange(0)])
