"""Time of one training step per recipe, as a ratio to the same step in float32.

python benchmarks/train_step.py --rounds 15 --write
"""

from __future__ import annotations

import argparse

import common
import jax

import jaxquant as jq
from jaxquant import design_space, training
from jaxquant.formats import MXFP8, NVFP4
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, Operand, Rule, Source
from jaxquant.recipes.training import nvfp4, switchback, w8a8_int8
from jaxquant.recipes.training.systems import SYSTEMS
from jaxquant.training import init_state, make_step, optimizer

SHAPE = TransformerShape(
  vocab=512, d_model=256, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=1024, max_len=128
)
BATCH, SEQ = 8, 128
SITE = "layers/mlp/up"  # one of those that every recipe quantizes
NEAREST = "nvfp4, nearest"


def forward_only(fmt: jq.Format) -> jq.Recipe:
  """x and w in `fmt`, straight-through gradients in float32."""
  rule = Rule(x=Operand(fmt), w=Operand(fmt))
  return jq.Recipe((("embed|head", FLOAT), (".*", rule)), name=f"{fmt} forward")


def six(recipe: jq.Recipe) -> bool:
  """Whether all operands of all three GEMMs are quantized."""
  return all(operand.fmt is not None for operand in recipe.rule(SITE).operands.values())


def recipes() -> dict[str, tuple[jq.Recipe | None, float | None]]:
  """(recipe, the goal of its ratio) of each case."""
  systems = {name: s.make() for name, s in SYSTEMS.items() if not name.endswith("_gla")}
  goals = {name: 1.40 if six(recipe) else None for name, recipe in systems.items()}
  goals["w8a8_int8"] = 0.50
  return {
    "float32": (None, None),
    **{name: (recipe, goals[name]) for name, recipe in systems.items()},
    NEAREST: (nvfp4(disable_sr=True), 1.40),
    "nvfp4, dequantized backward": (nvfp4(backward_override=Source.FORWARD), None),
    "switchback, int8 kept": (switchback(save_int8=True), None),
    "w8a8_int8, head too": (w8a8_int8(float_sites="embed"), 0.50),
    "mxfp8 forward only": (forward_only(MXFP8), 1.05),
    "nvfp4 forward only": (forward_only(NVFP4), 1.05),
  }


def kept(apply: training.Apply, variables: dict, tokens: jax.Array) -> int:
  """Bytes that the backward pass of the loss keeps, parameters and recipe state apart."""
  loss = lambda variables: training.from_logits(apply)(variables, tokens, {"sr": jax.random.key(0)})
  return design_space.saved_bytes(loss, variables, held=(0,))


def noise(times: dict[str, list[float]]) -> str:
  """What random bits cost: the same recipe with and without stochastic rounding, round by round."""
  if not {"nvfp4", NEAREST} <= set(times):
    return ""
  _, ratio, spread = common.ratios(times, NEAREST)["nvfp4"]
  verdict = "do not dominate" if ratio < 1.25 else "DOMINATE"
  return (
    f"Random bits: `nvfp4`, whose gradient operands are rounded stochastically by the counter "
    f"hash, takes {ratio:.3f} (quartiles {spread:.3f}) of the time of the same recipe with "
    f"nearest rounding; they {verdict} (bound 1.25).\n\n"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument("--only", default="", help="comma-separated recipes beside float32")
  parser.add_argument("--write", action="store_true", help="write docs/results/train_step.md")
  args = parser.parse_args()
  model = Transformer(SHAPE)
  tokens = jax.random.randint(jax.random.key(0), (BATCH, SEQ + 1), 0, SHAPE.vocab)
  tx = optimizer(1000, 1e-3, 10)
  only = args.only.split(",") if args.only else None
  chosen = {k: v for k, v in recipes().items() if not only or k in (*only, "float32")}
  cases, facts = {}, {}
  for name, (recipe, _) in chosen.items():
    apply = model.apply if recipe is None else jq.quantized(model, recipe)
    state = init_state(model, tx, tokens[:, :-1], 0, recipe)
    jitted = make_step(apply, tx, 0, recipe=recipe)
    step, seconds, temp = common.compiled(jitted, state, tokens)
    box = [state]

    def run(step=step, box=box):
      box[0], metrics = step(box[0], tokens)
      return metrics

    cases[name] = run
    facts[name] = (seconds, temp, kept(apply, state.variables, tokens))
    print(f"{name}: compiled in {seconds:.1f} s", flush=True)
  measured = common.interleaved(cases, args.rounds)
  times = common.ratios(measured, "float32")
  rows = []
  for name, (ms, ratio, spread) in times.items():
    goal = chosen[name][1]
    seconds, temp, saved = facts[name]
    verdict = "" if goal is None else f"<= {goal:.2f}: " + ("met" if ratio <= goal else "missed")
    rows.append(
      [name, f"{ms:.1f}", f"{ratio:.3f}", f"{spread:.3f}", verdict, f"{seconds:.1f}",
       f"{seconds / facts['float32'][0]:.2f}", f"{temp / 2**20:.0f}",
       f"{temp / facts['float32'][1]:.2f}", f"{saved / 2**20:.0f}"]
    )  # fmt: skip
  header = ["step", "ms", "ratio", "quartiles", "goal", "compile s", "ratio", "temp MiB", "ratio"]
  header.append("saved MiB")
  table = common.markdown(header, rows)
  print(table)
  if args.write:
    s = SHAPE
    body = (
      f"Decoder: {s.n_layers} layers, d={s.d_model}, ff={s.d_ff}, vocabulary {s.vocab}, sequence "
      f"{SEQ}, batch {BATCH}; AdamW included. Times and ratios are medians over {args.rounds} "
      f"rounds that run every case once; quartiles is the spread of the ratio. Recipes with all "
      f"six operands quantized have the goal 1.40. Temporary memory is what the compiled step "
      f"needs beside its arguments and results, saved what of it the backward pass keeps of the "
      f"forward pass (`design_space.saved_bytes`).\n\n{noise(measured)}{table}"
    )
    common.write("train_step", "Training step, ratio to float32", body)


if __name__ == "__main__":
  main()
