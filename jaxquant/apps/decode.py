"""Continues prompts with a float, a quantized or a packed model, and says how fast.

  python -m jaxquant.apps.decode --prompt "def main(argv):" --temperature 0.7 --top_p 0.95
  python -m jaxquant.apps.decode --recipe nvfp4        # packs the shipped model, then decodes
  python -m jaxquant.apps.decode --checkpoint out/w4a16_gptq --prompt_file prompt.py

Text goes to stdout, the speed of prefill and of decode, each without compilation, to stderr.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

import jaxquant as jq
from jaxquant import data
from jaxquant.apps import command
from jaxquant.apps.quantize import pack
from jaxquant.decode import make_decoder, pad_prompts
from jaxquant.models import TransformerShape
from jaxquant.models.stored import Stored
from jaxquant.recipes import RECIPES

PROMPT = "import os\n\n\ndef "

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Folder of jaxquant.apps.quantize; instead of --model.", flag_values=FLAGS
)
_MODEL = flags.DEFINE_string("model", "shipped", command.MODEL_HELP, flag_values=FLAGS)
_RECIPE = flags.DEFINE_string(
  "recipe",
  None,
  f"Packs --model first: one of {', '.join(sorted(RECIPES))}. Default: float.",
  flag_values=FLAGS,
)
_PROMPT = flags.DEFINE_multi_string(
  "prompt", None, "Text to continue; repeat it for a batch.", flag_values=FLAGS
)
_FILE = flags.DEFINE_multi_string(
  "prompt_file", None, "File whose text is a prompt; repeat it for a batch.", flag_values=FLAGS
)
_TOKENS = flags.DEFINE_integer(
  "new_tokens", 128, "Bytes to add to each prompt.", lower_bound=1, flag_values=FLAGS
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", flag_values=FLAGS)
_TOP_K = flags.DEFINE_integer(
  "top_k", None, "Draw from the k most likely bytes only.", flag_values=FLAGS
)
_TOP_P = flags.DEFINE_float(
  "top_p", None, "Draw from the fewest bytes that hold this probability.", flag_values=FLAGS
)
_STOP = flags.DEFINE_integer(
  "stop", data.SEPARATOR, "Byte that ends a text; -1: none.", flag_values=FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", flag_values=FLAGS)


class Completion(NamedTuple):
  """What `generate` returns.

  Attributes:
    texts: the continuations, without the stop byte.
    prefill_rate: prompt tokens per second, all rows together.
    decode_rate: new tokens per second, all rows together; NaN if prefill gave all of them.
  """

  texts: list[str]
  prefill_rate: float
  decode_rate: float


def generate(
  apply: Callable,
  shape: TransformerShape,
  variables: object,
  prompts: Sequence[str],
  new_tokens: int,
  *,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  stop: int | None = None,
  seed: int = 0,
  repeats: int = 1,
) -> Completion:
  """Decodes a batch of prompts and times it; compiled ahead, so that no compilation is timed.

  Args:
    apply: `model.apply` or `jaxquant.quantized(model, recipe)`.
    shape: of the model.
    variables: float or packed.
    prompts: any lengths, each the start of a document; even an empty one.
    new_tokens: per prompt, at most.
    temperature: see `jaxquant.decode.sample`, as the next two.
    top_k: the most likely tokens.
    top_p: the nucleus.
    stop: a byte that ends a text.
    seed: of the draws.
    repeats: runs the same thing this often and times the fastest: other programs disturb.
  """
  decoder = make_decoder(
    apply, shape, new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop
  )
  tokens, lengths = pad_prompts([document(p) for p in prompts])
  prefill = decoder.prefill.lower(variables, tokens, lengths).compile()
  (logits, cache), prefill_seconds = _timed(prefill, variables, tokens, lengths)
  key = jax.random.key(seed)
  loop = decoder.loop.lower(variables, logits, cache, key).compile()
  (out, ends, _), decode_seconds = _timed(loop, variables, logits, cache, key)
  for _ in range(repeats - 1):
    (logits, cache), again = _timed(prefill, variables, tokens, lengths)
    prefill_seconds = min(prefill_seconds, again)
    decode_seconds = min(decode_seconds, _timed(loop, variables, logits, cache, key)[1])
  out, ends = jax.device_get((out, ends))
  kept = [row[:end] for row, end in zip(out, ends)]
  texts = [data.decode(row[:-1] if len(row) and row[-1] == stop else row) for row in kept]
  after_prefill = int((ends - 1).sum())  # prefill gave the logits of the first ones
  rate = after_prefill / decode_seconds if after_prefill else float("nan")
  return Completion(texts, int(lengths.sum()) / prefill_seconds, rate)


def document(prompt: str) -> np.ndarray:
  """The tokens of a prompt that starts a document, as the model saw documents start."""
  return np.append(np.int32(data.SEPARATOR), data.encode(prompt))


def _timed(run: Callable, *args: object) -> tuple:
  start = time.perf_counter()
  out = jax.block_until_ready(run(*args))
  return out, time.perf_counter() - start


def _model() -> tuple[Stored, Callable]:
  """What the flags name, and its apply function."""
  if _CHECKPOINT.value and _RECIPE.value:
    raise ValueError("--recipe packs a float --model; a --checkpoint has its recipe inside.")
  if _RECIPE.value:
    command.recipe_names(_RECIPE.value)
    found = pack(command.open_float(_MODEL.value), _RECIPE.value, donate=True)
  else:
    found = command.open_model(_CHECKPOINT.value or _MODEL.value)
  recipe = command.recipe_of(found)
  return found, found.model.apply if recipe is None else jq.quantized(found.model, recipe)


def main(argv: Sequence[str]) -> None:
  """Decodes as the command line says."""
  command.parse(FLAGS, __doc__, argv)
  with command.said_plainly():
    prompts = list(_PROMPT.value or [])
    prompts += [pathlib.Path(path).read_text() for path in _FILE.value or []]
    prompts = prompts or [PROMPT]
    found, apply = _model()
    done = generate(
      apply,
      found.model.shape,
      found.variables,
      prompts,
      _TOKENS.value,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      stop=None if _STOP.value < 0 else _STOP.value,
      seed=_SEED.value,
    )
  for i, (prompt, text) in enumerate(zip(prompts, done.texts)):
    if len(prompts) > 1:
      print(f"--- {i + 1} of {len(prompts)} ---")
    print(prompt + text)
  print(
    f"{found.about.get('recipe', 'float')}, {len(prompts)} prompts at once: prefill "
    f"{done.prefill_rate:,.0f} tokens/s, decode {done.decode_rate:,.0f} tokens/s",
    file=sys.stderr,
  )


if __name__ == "__main__":
  main(sys.argv)
