"""Decoding: prefill, then one token at a time, in one jitted loop for float and packed weights.

Letters: B prompts, T tokens of the longest prompt, V vocabulary, S new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.cache import init_cache
from jaxquant.cache.plain import KVShape


def sample(
  logits: jax.Array,
  key: jax.Array,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> jax.Array:
  """One token from softmax(logits / temperature), cut to its likely part.

  Args:
    logits: float [V].
    key: unused at temperature 0.
    temperature: 0 takes the most likely token.
    top_k: only the k most likely tokens; those that tie with the last one stay.
    top_p: then only the fewest tokens that hold at least this probability (nucleus sampling,
      arXiv:1904.09751, section 3.1); ties stay here too.

  Returns:
    int32 scalar.

  Raises:
    ValueError: temperature < 0, top_k < 1, or top_p outside (0, 1].

  Example:
    >>> import jax, jax.numpy as jnp
    >>> int(sample(jnp.array([0.0, 2.0, 1.0]), jax.random.key(0)))
    1
  """
  check_sampling(temperature, top_k, top_p)
  if temperature == 0:
    return jnp.argmax(logits, -1).astype(jnp.int32)
  logits = logits.astype(jnp.float32) / temperature
  if top_k is not None and top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][-1]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None and top_p < 1:
    descending = jnp.sort(logits, descending=True)
    probability = jax.nn.softmax(descending)
    before = jnp.cumsum(probability) - probability  # 0 for the first: one token always stays
    least = jnp.where(before < top_p, descending, jnp.inf).min()
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
  """Raises ValueError for what `sample` cannot do."""
  if temperature < 0:
    raise ValueError(f"temperature={temperature} is negative; 0 is greedy.")
  if top_k is not None and top_k < 1:
    raise ValueError(f"top_k={top_k} keeps no token; use None to keep all.")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p={top_p} is not in (0, 1]; use None to keep all.")


class Decoder(NamedTuple):
  """Two jitted functions, apart so that each can be timed.

  Attributes:
    prefill: (variables, tokens int32 [B, T] padded on the right, lengths int32 [B]) ->
      (logits [B, V] after each prompt, cache).
    loop: (variables, logits, cache, key) -> (tokens int32 [B, S], lengths int32 [B], cache). The
      cache is donated, and comes back with all new tokens but the last. What follows a row's length
      in `tokens` repeats its stop token.
  """

  prefill: jax.stages.Wrapped
  loop: jax.stages.Wrapped


def make_decoder(
  apply: Callable,
  shape: KVShape,
  new_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop: int | None = None,
) -> Decoder:
  """The decoder of a model; each call of this function is a jit cache of its own.

  Row b draws from `fold_in(key, b)`, so a row's tokens do not depend on its neighbours, as long as
  the recipe quantizes activations per token or per block. A dynamic scale per tensor (the second
  level of NVFP4) spans all rows of a batch and their padding; a static one (`jaxquant.Static`) is
  that of calibration.

  Args:
    apply: `model.apply` or `jaxquant.quantized(model, recipe)`.
    shape: the model's, for the size of the cache.
    new_tokens: S.
    temperature: see `sample`, as the next two.
    top_k: the most likely tokens.
    top_p: the nucleus.
    stop: a token that ends its row; it is the last one counted.
  """
  check_sampling(temperature, top_k, top_p)
  if new_tokens < 1:
    raise ValueError(f"new_tokens={new_tokens}; decode at least one.")
  # The key is a formality: a training rule that asks for one rounds only gradients with it.
  run = lambda variables, tokens, cache, lengths: apply(
    variables, tokens, cache=cache, lengths=lengths, rngs={"sr": jax.random.key(0)}
  )
  ended = lambda token: token == -1 if stop is None else token == stop

  def prefill(variables, tokens, lengths):
    cache = init_cache(shape, tokens.shape[0], _total(tokens.shape[1], new_tokens, shape.max_len))
    logits, cache = run(variables, tokens, cache, lengths)
    return logits[jnp.arange(tokens.shape[0]), lengths - 1], cache

  def draw(logits, key, step):
    keys = jax.vmap(lambda b: jax.random.fold_in(jax.random.fold_in(key, b), step))
    one = lambda row, k: sample(row, k, temperature, top_k, top_p)
    return jax.vmap(one)(logits, keys(jnp.arange(logits.shape[0])))

  def loop(variables, logits, cache, key):
    def more(carry):
      step, _, _, done, _ = carry
      return (step < new_tokens) & ~done.all()

    def body(carry):
      step, token, cache, done, out = carry
      logits, cache = run(variables, token[:, None], cache, (~done).astype(jnp.int32))
      token = jnp.where(done, token, draw(logits[:, 0], key, step))
      return step + 1, token, cache, done | ended(token), out.at[:, step].set(token)

    first = draw(logits, key, 0)
    out = jnp.full((first.shape[0], new_tokens), 0 if stop is None else stop, jnp.int32)
    out = out.at[:, 0].set(first)
    start = (1, first, cache, ended(first), out)
    _, _, cache, _, out = jax.lax.while_loop(more, body, start)
    return out, _lengths(out, ended), cache

  return Decoder(jax.jit(prefill), jax.jit(loop, donate_argnums=2))


def _total(prompt: int, new_tokens: int, max_len: int) -> int:
  """Tokens of a row in the end; raises ValueError if the model has no place for them."""
  total = prompt + new_tokens
  if total > max_len:
    raise ValueError(
      f"{prompt} prompt tokens + {new_tokens} new ones = {total}, but the model's max_len is "
      f"{max_len}.\n  Shorten the prompt or ask for fewer tokens."
    )
  return total


def _lengths(tokens: jax.Array, ended: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Tokens up to the first stop, that one included: [B, S] -> int32 [B]."""
  size = tokens.shape[1]
  at = jnp.where(ended(tokens), jnp.arange(size), size - 1)
  return (at.min(-1) + 1).astype(jnp.int32)


def pad_prompts(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  """Ragged prompts -> tokens int32 [B, T] padded with 0 on the right, and lengths int32 [B].

  Raises:
    ValueError: no prompt, or an empty one: there is nothing to condition on.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  if not len(lengths) or not lengths.all():
    raise ValueError(f"prompts of lengths {lengths.tolist()}: each needs at least one token.")
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  return tokens, lengths


def complete(
  decoder: Decoder, variables: object, prompts: Sequence[np.ndarray], key: jax.Array
) -> list[np.ndarray]:
  """The continuation of each prompt, int32 [<= S], the stop token included.

  Args:
    decoder: from `make_decoder`.
    variables: float or packed.
    prompts: int [T_b] each.
    key: all randomness of the call.
  """
  tokens, lengths = pad_prompts(prompts)
  logits, cache = decoder.prefill(variables, tokens, lengths)
  out, ends, _ = decoder.loop(variables, logits, cache, key)
  out, ends = jax.device_get((out, ends))
  return [row[:end] for row, end in zip(out, ends)]
