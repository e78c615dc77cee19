"""Measures what low-precision training costs at a small size, and writes it down.

  python -m jaxquant.apps.training_evidence                    # all, into docs/results/training.md
  python -m jaxquant.apps.training_evidence --recipes f32,nvfp4 --seeds 1
  python -m jaxquant.apps.training_evidence --render           # only the tables, from what is known

Every run is kept in --cache as soon as it has ended and not made again, so the same command goes on
where it was killed; several processes may share a cache if they are given different --recipes. A
run belongs to its recipe, model and settings: a changed recipe is measured anew.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from absl import flags

import jaxquant as jq
from jaxquant import data, training
from jaxquant.apps import command
from jaxquant.apps.results import Results, commit, fingerprint, made_with
from jaxquant.gates import outliers
from jaxquant.models.architectures import ARCHITECTURES, build
from jaxquant.paired import Gap, paired_gap
from jaxquant.recipes import RECIPES
from jaxquant.training_claims import CLAIMS, FLOAT, ORDERED, VARIANTS, Claim

FLAGS = flags.FlagValues()
_RECIPES = flags.DEFINE_list("recipes", [], "Only these; default: all.", flag_values=FLAGS)
_ARMS = flags.DEFINE_list("arms", [], "Only these models; default: all.", flag_values=FLAGS)
_SEEDS = flags.DEFINE_integer(
  "seeds", 3, "Of parameters, batches and noise.", lower_bound=1, flag_values=FLAGS
)
_STEPS = flags.DEFINE_integer("steps", 300, "Updates.", lower_bound=1, flag_values=FLAGS)
_RENDER = flags.DEFINE_bool("render", False, "Measure nothing.", flag_values=FLAGS)
_CACHE = flags.DEFINE_string(
  "cache", "out/training_evidence.jsonl", "Where runs are kept.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", "docs/results/training.md", "The tables.", flag_values=FLAGS)


@dataclasses.dataclass(frozen=True)
class Arm:
  """A model to train under every recipe.

  Attributes:
    what: for people.
    architecture: of `jaxquant.models.architectures`.
    factor: of outlier channels that are held through training; None: as it is.
    recipes: which; None: all.
  """

  what: str
  architecture: str = "transformer"
  factor: float | None = None
  recipes: tuple[str, ...] | None = None


PATCHED = ("nvfp4", "chon", "chon_unpatched", "quartet", "quartet2", "mxfp4", "mxint4", "mxfp8")
LARGER = ("nvfp4", "chon", "chon_32", "chon_unpatched", "quartet", "mxfp4")
ARMS = {
  "softmax": Arm("softmax attention"),
  "gla": Arm("gated linear attention", "gla"),
  "outliers": Arm("softmax attention, outlier channels", factor=16.0, recipes=(FLOAT, *PATCHED)),
  "larger": Arm(
    "softmax attention, larger outlier channels", factor=64.0, recipes=(FLOAT, *LARGER)
  ),
}
SHAPE = {
  "vocab": 256, "d_model": 128, "n_layers": 2, "n_heads": 4, "d_ff": 320, "max_len": 128,
}  # fmt: skip
MIXERS = {
  "transformer": {"n_kv_heads": 4, "head_dim": 32},
  "gla": {"key_dim": 16, "value_dim": 32, "gate_rank": 16},
}
BATCH, SEQ, HELD_OUT = 8, 128, 40  # rows, tokens, batches
LAST = 100  # updates whose training losses are compared


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much is measured.

  Attributes:
    seeds: of parameters, batches and noise.
    steps: updates.
    shape: of the model.
    held_out: batches.
  """

  seeds: int = 3
  steps: int = 300
  shape: Mapping[str, int] = dataclasses.field(default_factory=lambda: SHAPE)
  held_out: int = HELD_OUT


def model_of(arm: Arm, plan: Plan) -> nn.Module:
  """The module of an arm."""
  return build(arm.architecture, {**plan.shape, **MIXERS[arm.architecture]})


def held(apply: Callable, model: nn.Module, factor: float | None) -> Callable:
  """The same function of the parameters, computed through outlier channels.

  Four channels of every norm's output are `factor` times larger and their readers' rows smaller, at
  every step: parameters, gradients and so the float run stay as they were (bit for bit for a power
  of two), but what is quantized has outliers from the first step to the last.
  """
  if factor is None:
    return apply
  change = outliers(factor)
  return lambda variables, *args, **kwargs: apply(change(model, variables), *args, **kwargs)


class Trainer:
  """One recipe on one arm; compiled once for all seeds."""

  def __init__(self, arm: Arm, name: str, plan: Plan, corpus: data.Corpus):
    """Compiles nothing yet."""
    self._plan, self._corpus = plan, corpus
    self._model, self._recipe = model_of(arm, plan), recipe_of(arm, name)
    apply = self._model.apply
    if self._recipe is not None:
      apply = jq.quantized(self._model, self._recipe)
    apply = held(apply, self._model, arm.factor)
    warmup = min(20, plan.steps // 2)
    self._tx = tx = training.optimizer(plan.steps, learning_rate=3e-3, warmup=warmup)
    step = lambda state, batch, seed: training.make_step(apply, tx, seed, recipe=self._recipe)(
      state, batch
    )
    self._step = jax.jit(step, donate_argnums=0)
    self._evaluate = training.make_evaluate(apply)

  def run(self, seed: int) -> dict:
    """Trains from scratch: training losses, the loss on held-out text, CPU time of a step.

    CPU time, the median over the steps, because wall time would be about the machine's other jobs.
    """
    batch = functools.partial(
      data.batch, self._corpus, seed, batch_size=BATCH, seq_len=self._plan.shape["max_len"]
    )
    state = training.init_state(self._model, self._tx, batch(step=0)[:, :-1], seed, self._recipe)
    losses, times = [], []
    for step in range(self._plan.steps):
      start = time.process_time()
      state, metrics = self._step(state, batch(step=step), seed)
      losses.append(float(metrics["loss"]))
      times.append(time.process_time() - start)
    size = {"batch_size": BATCH, "seq_len": self._plan.shape["max_len"]}
    held_out = data.eval_batches(self._corpus, n=self._plan.held_out, **size)
    return {
      "loss": self._evaluate(state.variables, held_out),
      "train": [round(loss, 5) for loss in losses],
      "cpu_ms": 1e3 * float(np.median(times)),
    }


def recipe_of(arm: Arm, name: str) -> jq.Recipe | None:
  """The recipe of a name on an arm; None for float32."""
  if name == FLOAT:
    return None
  row, options = VARIANTS.get(name, (name, {}))
  if row == "chon" and arm.architecture == "gla":
    options = {**options, "attention": "gla"}
  return RECIPES[row].make(**options)


def key_of(arm: Arm, name: str, plan: Plan, seed: int, corpus: str) -> dict:
  """What a run is determined by."""
  recipe = fingerprint(recipe_of(arm, name))
  own = {"architecture": arm.architecture, "factor": arm.factor, "shape": dict(plan.shape)}
  sizes = {"steps": plan.steps, "held_out": plan.held_out, "seed": seed, "corpus": corpus[:12]}
  return {"name": name, "recipe": recipe, **own, **sizes}


def runs(arm: Arm, plan: Plan) -> list[str]:
  """Names of the recipes of an arm that exist here, float first."""
  row = lambda name: VARIANTS.get(name, (name,))[0]
  return [n for n in arm.recipes or ORDERED if n == FLOAT or row(n) in RECIPES]


Found = dict[str, dict[int, dict]]  # recipe -> seed -> what a run gave


def measured(
  arm: Arm,
  plan: Plan,
  results: Results,
  corpus: data.Corpus,
  wanted: Callable[[str], bool],
  said: Callable[[str], None] = print,
) -> Found:
  """The runs of an arm: those that are wanted are made, others looked up."""
  found: Found = {}
  text = data.fingerprint(corpus)
  for name in runs(arm, plan):
    trainer = Trainer(arm, name, plan, corpus)
    for seed in range(plan.seeds):
      key = key_of(arm, name, plan, seed, text)
      known = results.get(key)
      if known is None and wanted(name):
        known = trainer.run(seed)
        results.put(key, known)
        said(f"{arm.what}, {name}, seed {seed}: {known['loss']:.4f}")
      if known is not None:
        found.setdefault(name, {})[seed] = known
  return found


def across_seeds(found: Found, name: str) -> Gap | None:
  """Loss minus that of float, paired by seed; the interval is Student's over seeds."""
  seeds = sorted(set(found[name]) & set(found.get(FLOAT, {})))
  if not seeds:
    return None
  gaps = [found[name][s]["loss"] - found[FLOAT][s]["loss"] for s in seeds]
  return paired_gap(np.array(gaps), batches=len(seeds))


def across_steps(found: Found, name: str) -> Gap | None:
  """The same of the training losses of the last steps, by 10 batch means of each seed."""
  seeds = sorted(set(found[name]) & set(found.get(FLOAT, {})))
  if not seeds:
    return None
  last = lambda run: np.array(run["train"][-LAST:])
  gaps = [last(found[name][s]) - last(found[FLOAT][s]) for s in seeds]
  return paired_gap(np.concatenate(gaps), batches=10 * len(seeds))


def table(found: Found) -> str:
  """One line per recipe, by rising loss."""
  mean = {n: float(np.mean([r["loss"] for r in by.values()])) for n, by in found.items()}
  lines = [
    "| recipe | loss | spread | / float | gap, over seeds | gap, last updates | CPU ms | seeds |",
    "|---|---|---|---|---|---|---|---|",
  ]
  base = mean.get(FLOAT)
  for name in sorted(mean, key=mean.get):
    values = [r["loss"] for r in found[name].values()]
    spread = f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    ratio = "" if base is None else f"{mean[name] / base:.4f}"
    gaps = ["" if g is None or name == FLOAT else str(g) for g in (
      across_seeds(found, name), across_steps(found, name))]  # fmt: skip
    ms = np.median([r["cpu_ms"] for r in found[name].values()])
    cells = (f"`{name}`", f"{mean[name]:.4f}", spread, ratio, *gaps, f"{ms:.0f}", str(len(values)))
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def judged(claims: Sequence[Claim], found: Found) -> str:
  """What became of the claims: by the means of all seeds, and in how many seeds they hold."""
  lines = ["| claim | verdict | why |", "|---|---|---|"]
  for claim in claims:
    missing = sorted(set(claim.names) - set(found))
    if missing:
      lines.append(f"| {claim.text} | not measured | {', '.join(missing)} |")
      continue
    seeds = sorted(set.intersection(*(set(found[n]) for n in claim.names)))
    losses = [{n: found[n][s]["loss"] for n in claim.names} for s in seeds]
    mean = {n: float(np.mean([loss[n] for loss in losses])) for n in claim.names}
    count = sum(not claim.against(loss) for loss in losses)
    against = claim.against(mean)
    verdict = "passes" if not against else "FAILS" if claim.judged else "does not hold"
    verdict = "holds" if not claim.judged and not against else verdict
    why = "; ".join([*against, f"holds in {count} of {len(seeds)} seeds"])
    lines.append(f"| {claim.text} | {verdict} | {why} |")
  return "\n".join(lines)


EXPLAINED = """\
A decoder of 2 layers, d=128, ff=320, vocabulary 256 (bytes), 0.44 M parameters with softmax
attention; {batch} x {seq} tokens per update, {steps} updates of AdamW (peak 3e-3, warmup 20, cosine
to 0, decay 0.1, clipped to norm 1), on the source text of the standard library. Linear layers of
the blocks are quantized in all six operands; embedding, head and attention stay in float32. Loss:
nats per byte on {held_out} held-out batches, computed under the recipe. A seed gives parameters,
batches and noise; every recipe starts from the parameters of the float run of its seed and sees its
batches.

Loss and spread are mean and standard deviation over seeds. Gap: the loss minus that of the float
twin of the same seed, with a 95 % interval: Student's over seeds for held-out text; 10 batch means
of each seed for the training losses of the last {last} updates (`jaxquant.paired`; this one is
about these runs, not about other seeds). CPU ms: of all cores, for one update. Claims are judged by
the mean over seeds; what is only reported is not judged. Outlier channels: four of every norm's
output are 16 times (larger ones: 64 times) larger during the whole training, and what reads them
has smaller rows; the float run is the same, bit for bit."""


def render(found: Mapping[str, Found], plan: Plan, line: str) -> str:
  """The whole document."""
  about = f"Command: `{line}`. Written at {commit()}, {made_with()}."
  sizes = {"steps": plan.steps, "held_out": plan.held_out, "last": LAST}
  parts = ["# Low-precision training", about, EXPLAINED.format(batch=BATCH, seq=SEQ, **sizes)]
  for name, arm in ARMS.items():
    parts.append(f"## {arm.what[0].upper()}{arm.what[1:]}")
    if not found.get(name):
      parts.append("Not measured.")
      continue
    parts += [judged(CLAIMS[name], found[name]), table(found[name])]
  return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> None:
  """Measures as the command line says."""
  command.parse(FLAGS, __doc__, argv)
  with command.said_plainly():
    for flag, known in ((_RECIPES, {*ORDERED, *VARIANTS}), (_ARMS, ARMS)):
      unknown = sorted(set(flag.value) - set(known))
      if unknown:
        raise ValueError(f"--{flag.name} {','.join(unknown)}: there are {', '.join(sorted(known))}")
  plan, results = Plan(_SEEDS.value, _STEPS.value), Results(pathlib.Path(_CACHE.value))
  corpus, found = data.load(), {}
  for name, arm in ARMS.items():
    if arm.architecture not in ARCHITECTURES:
      continue
    chosen = not _RENDER.value and (not _ARMS.value or name in _ARMS.value)
    wanted = lambda recipe, chosen=chosen: (
      chosen and (not _RECIPES.value or recipe in _RECIPES.value)
    )
    said = lambda text: print(text, flush=True)
    found[name] = measured(arm, plan, results, corpus, wanted, said)
  out = pathlib.Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(
    render(found, plan, " ".join(["python -m jaxquant.apps.training_evidence", *argv[1:]]))
  )
  print(f"wrote {out}")


if __name__ == "__main__":
  main(sys.argv)
