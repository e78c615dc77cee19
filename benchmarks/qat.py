"""Quantization-aware training in the small: what each system buys over its own baseline.

nice -n 10 python benchmarks/qat.py --write          # docs/results/qat.md
python benchmarks/qat.py --only operators --seeds 1

Nothing here is tuned: learning rates are the first that were tried, and the same for all arms of a
comparison, which also share parameters at the start, batches and steps. A section is kept in
out/qat as soon as it has ended and not measured again: delete it there.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxquant as jq
from jaxquant import data, formats, training
from jaxquant.models import Transformer, TransformerShape
from jaxquant.quantizers import mimic_loss, principal_directions
from jaxquant.recipe import Recipe
from jaxquant.recipes.training import bibench, binarydm, gaussws, qvgen
from jaxquant.recipes.training.bibench import OPERATORS
from jaxquant.state import between_steps, learned, merge, split

SHAPE = TransformerShape(256, 128, 2, n_heads=4, n_kv_heads=4, head_dim=32, d_ff=344, max_len=64)
ROWS, LENGTH = 16, 64  # 1024 tokens a step
STEPS = 300
FLOAT_SITES = "embed|head"


def on_weights(fmt: formats.Format) -> Recipe:
  """The LM's hidden weights in a format, nothing else."""
  return Recipe(((FLOAT_SITES, jq.FLOAT), (".*", jq.weight_only(fmt))))


def named(tree: dict, **groups: Sequence[str]) -> dict:
  """Labels for optax.multi_transform: the group whose names hold the leaf's, else "rest"."""
  label = lambda path: next((g for g, names in groups.items() if path[-1].key in names), "rest")
  return jax.tree.map_with_path(lambda path, _: label(path), tree)


# --- language model ------------------------------------------------------------------------------


@functools.cache
def evaluator(recipe: Recipe | None) -> Callable[[dict], float]:
  """Variables -> held-out loss, nats per byte."""
  model = Transformer(SHAPE)
  apply = model.apply if recipe is None else jq.quantized(model, recipe)
  found = training.make_evaluate(apply)
  held_out = list(data.eval_batches(data.load(), batch_size=ROWS, seq_len=LENGTH, n=16))
  return lambda variables: found(variables, held_out)


@functools.cache
def batches(seed: int) -> np.ndarray:
  """int32 [steps, ROWS, LENGTH + 1] for a whole run and what follows it."""
  rows = data.batch(data.load(), seed, 0, 2 * STEPS * ROWS, LENGTH)
  return rows.reshape(-1, ROWS, LENGTH + 1)


def train_lm(
  recipe: Recipe, tx: optax.GradientTransformation, seeds: Sequence[int]
) -> dict[int, training.TrainState]:
  """Fresh LMs after STEPS updates, by seed."""
  model, found = Transformer(SHAPE), {}
  step = training.make_step(jq.quantized(model, recipe), tx, 0, recipe=recipe)
  for seed in seeds:
    state = training.init_state(model, tx, batches(seed)[0, :, :-1], seed, recipe)
    for i in range(STEPS):
      state, _ = step(state, batches(seed)[i])
    found[seed] = state
  return found


@functools.cache
def plain_models(seeds: tuple[int, ...]) -> dict[int, dict]:
  """Parameters of LMs trained with bf16 weights."""
  states = train_lm(on_weights(formats.BFLOAT16), training.optimizer(STEPS, 3e-3, 30), seeds)
  return {seed: state.params for seed, state in states.items()}


def noise_optimizer() -> optax.GradientTransformation:
  """The run's AdamW; bits decay to a tenth of the way within its few steps, not in 1e5."""
  plain = training.optimizer(STEPS, 3e-3, 30)
  schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 30, STEPS)
  bits = optax.adamw(schedule, b2=0.95, weight_decay=5.0)
  return optax.multi_transform({"rest": plain, "bits": bits}, lambda t: named(t, bits=["bits"]))


def mean_bits(quant: dict, start: float, target: float) -> float:
  """Mean b_t of GaussWS's blocks."""
  b = jnp.concatenate([a.ravel() for a in jax.tree.leaves(learned(quant))])
  return float(target + (start - target) * b.mean())


PATHS = {"GaussWS 6 to 4": (6.0, 4.0), "GaussWS 6": (6.0, 6.0), "GaussWS 8 to 6": (8.0, 6.0)}
STORED = (formats.BFLOAT16, formats.MXFP6_E2M3, formats.MXFP6_E3M2, formats.MXFP4)


def noisy_models(path: tuple[float, float], seeds: Sequence[int]) -> dict[int, tuple[dict, str]]:
  """(parameters, mean bits at the end) by seed."""
  start, target = path
  states = train_lm(gaussws(start=start, target=target), noise_optimizer(), seeds)
  return {s: (v.params, f"{mean_bits(v.quant, start, target):.2f}") for s, v in states.items()}


def gaussws_section(seeds: Sequence[int]) -> str:
  """(a)"""
  plain = {seed: (params, "") for seed, params in plain_models(seeds).items()}
  arms = {"bf16": plain} | {name: noisy_models(path, seeds) for name, path in PATHS.items()}
  rows, fp6 = [], {}
  for name, models in arms.items():
    for seed, (params, bits) in models.items():
      losses = [evaluator(on_weights(fmt))({"params": params}) for fmt in STORED]
      rises = [f"{loss - losses[0]:+.4f}" for loss in losses[1:]]
      rows.append([name, str(seed), bits, f"{losses[0]:.4f}", *rises])
      fp6.setdefault(name, []).append(losses[1])
  header = ["training", "seed", "mean bits at the end", "loss, bf16 weights"]
  header += ["MXFP6 E2M3", "MXFP6 E3M2", "MXFP4"]
  means = {name: statistics.mean(losses) for name, losses in fp6.items()}
  return (
    f"## GaussWS against bf16\n\n2-layer LM ({SHAPE.d_model} wide), {STEPS} AdamW steps of "
    f"{ROWS * LENGTH} bytes; weights of the blocks cast to bf16 in all arms. The bits are pulled "
    "by a weight decay of 5, because the run is short. Held-out loss in nats per byte without "
    "noise, then what nearest rounding of the trained weights adds.\n\n"
    + common.markdown(header, rows)
    + "\n\nFP6 (E2M3) loss, mean of seeds: "
    + ", ".join(f"{name} {loss:.4f}" for name, loss in means.items())
    + ". "
    + verdict(
      means["GaussWS 6 to 4"] < means["bf16"],
      "That training with noise from 6 to 4 bits gives a lower FP6 loss than bf16 at equal steps",
    )
    + " The noise at b bits has a deviation of 0.57 max |w| 2^(1 - b), which is 24 % of the "
    "weights' own at 4 bits if they are normal (blocks of 1024, max 3.4 deviations) and 6 % at 6 "
    "bits; FP6 rounding has about 2 %."
  )


def verdict(holds: bool, what: str) -> str:
  """A sentence."""
  return f"{what} {'holds' if holds else 'does NOT hold'} here."


PHASE = 40  # steps in a phase of QVGen: rank 8 is gone after 160


def distilled(teacher: dict) -> Callable[[training.Apply], training.Loss]:
  """KL from the float model's predictions, as `loss_of` of `training.make_step`."""

  def loss_of(apply: training.Apply) -> training.Loss:
    def loss(variables, batch, rngs):
      told = jax.nn.log_softmax(Transformer(SHAPE).apply({"params": teacher}, batch[:, :-1]))
      said = jax.nn.log_softmax(apply(variables, batch[:, :-1], rngs=rngs))
      return (jnp.exp(told) * (told - said)).sum(-1).mean()

    return loss

  return loss_of


def qvgen_optimizer(steps: int) -> optax.GradientTransformation:
  """AdamW at 3e-4, clips of the inputs at 1e-2."""
  rates = {"rest": 3e-4, "clips": 1e-2}
  rates = {n: optax.warmup_cosine_decay_schedule(0.0, r, 16, steps) for n, r in rates.items()}
  groups = {n: optax.adamw(r, b2=0.95, weight_decay=1e-4) for n, r in rates.items()}
  label = lambda tree: named(tree, clips=["clip_up", "clip_lo"])
  return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, label))


def qvgen_arm(recipe: Recipe, teacher: dict, seed: int, steps: int) -> tuple[float, float, float]:
  """(held-out loss before, after, median norm of all gradients)."""
  model, tx, tokens = Transformer(SHAPE), qvgen_optimizer(steps), batches(seed)[STEPS:]
  params = jax.tree.map(jnp.copy, teacher)
  quant = jq.init_quant(model, {"params": params}, recipe, tokens[0, :, :-1])
  opt_state = tx.init({"params": params, "quant": learned(quant)})
  state = training.TrainState(jnp.zeros((), jnp.int32), params, opt_state, quant)
  start = evaluator(recipe)(state.variables)
  step = training.make_step(
    jq.quantized(model, recipe), tx, seed, recipe=recipe, loss_of=distilled(teacher)
  )
  norms = []
  for i in range(steps):
    state, metrics = step(state, tokens[i])
    state = state.replace(quant=between_steps(recipe, state.quant, i + 1))
    norms.append(float(metrics["grad_norm"]))
  return start, evaluator(recipe)(state.variables), statistics.median(norms)


def qvgen_section(seeds: Sequence[int]) -> str:
  """(d)"""
  steps, rows, after, plain = 4 * PHASE + 20, [], {}, plain_models(seeds)
  for seed in seeds:
    floating = evaluator(None)({"params": plain[seed]})
    for name, rank in (("without", None), ("with", 8)):
      recipe = qvgen(bits=3, rank=rank, steps=PHASE)
      before, end, norm = qvgen_arm(recipe, plain[seed], seed, steps)
      after.setdefault(name, []).append(end - floating)
      row = [before - floating, end - floating, norm]
      rows.append([name, str(seed), f"{floating:.4f}", *(f"{v:.4f}" for v in row)])
  header = ["branch", "seed", "float loss", "W3A4 above it, before", "after", "median |gradient|"]
  means = {name: statistics.mean(v) for name, v in after.items()}
  return (
    f"## QVGen with and without its branch\n\nThe bf16 models above as teachers, W3A4, {steps} "
    f"steps of distillation at 3e-4 (clips 1e-2): rank 8 decays over 4 phases of {PHASE} and is "
    "gone for the last 20 steps, so both arms end as the same kind of model.\n\n"
    + common.markdown(header, rows)
    + f"\n\nMean rise of the loss after training: with {means['with']:.4f}, without "
    f"{means['without']:.4f}: " + verdict(means["with"] < means["without"], "that the branch helps")
  )


# --- diffusion in two dimensions -----------------------------------------------------------------


class Denoiser(nn.Module):
  """Noise of x [B, 2] at t [B]: an MLP of residual blocks behind an embedding of the time."""

  @nn.compact
  def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
    phases = t[:, None] * jnp.exp2(jnp.arange(6)) * jnp.pi
    h = nn.Dense(64, name="embed")(jnp.concatenate([x, jnp.sin(phases), jnp.cos(phases)], -1))
    for i in range(3):
      inside = nn.silu(nn.Dense(128, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}")(h)))
      h = h + nn.Dense(64, name=f"down{i}")(inside)
      self.sow("intermediates", f"block{i}", h)
    return nn.Dense(2, name="head")(nn.LayerNorm(name="norm")(h))


class Noised(NamedTuple):
  """A diffusion batch: x_t = cos(pi t / 2) x_0 + sin(pi t / 2) e."""

  x: jax.Array
  t: jax.Array
  noise: jax.Array


def points(key: jax.Array, n: int = 256) -> Noised:
  """Eight normals on a circle, noised."""
  a, b, c, d = jax.random.split(key, 4)
  angle = jax.random.randint(a, (n,), 0, 8) * jnp.pi / 4
  x = 1.4 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1) + 0.1 * jax.random.normal(b, (n, 2))
  t, noise = jax.random.uniform(c, (n,)), jax.random.normal(d, (n, 2))
  along = jnp.pi / 2 * t[:, None]
  return Noised(jnp.cos(along) * x + jnp.sin(along) * noise, t, noise)


def features(apply: Callable, variables: dict, batch: Noised) -> tuple[jax.Array, dict]:
  """(predicted noise, features by block)."""
  found, seen = apply(variables, batch.x, batch.t, mutable=["intermediates"])
  return found, {name: a[0] for name, a in seen["intermediates"].items()}


def fit(loss: Callable, variables: dict, rate: float, steps: int, seed: int) -> dict:
  """Adam with a cosine on {"params", "quant"'s learned part}; loss(variables, batch)."""
  tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
  inside, outside = split(variables.get("quant", {}))
  join = lambda p, q: {"params": p, "quant": merge(outside, q)} if q else {"params": p}

  @jax.jit
  def step(trained, opt, i):
    key = jax.random.fold_in(jax.random.key(seed), i)
    grads = jax.grad(lambda p: loss(join(*p), points(key)))(trained)
    updates, opt = tx.update(grads, opt, trained)
    return optax.apply_updates(trained, updates), opt

  trained = (variables["params"], inside)
  opt = tx.init(trained)
  for i in range(steps):
    trained, opt = step(trained, opt, i)
  return join(*trained)


def denoising(apply: Callable) -> Callable[[dict, Noised], jax.Array]:
  """Mean squared error of the noise."""
  return lambda v, batch: jnp.square(apply(v, batch.x, batch.t) - batch.noise).mean()


def binarydm_arms(seed: int) -> dict[str, float]:
  """Held-out loss of each arm."""
  model, first = Denoiser(), points(jax.random.key(1000 + seed))
  held_out = points(jax.random.key(2000), 8192)
  teacher = fit(
    denoising(model.apply),
    {"params": model.init(jax.random.key(seed), first.x, first.t)["params"]},
    *(2e-3, 2000, seed),
  )
  score = lambda apply, v: float(jax.jit(denoising(apply))(v, held_out))
  found = {"float": score(model.apply, teacher)}
  directions = {
    name: principal_directions(f) for name, f in features(model.apply, teacher, first)[1].items()
  }
  for order, mimics in ((1, False), (2, False), (2, True)):
    recipe = binarydm(order=order)
    apply = jq.quantized(model, recipe)
    quant = jq.init_quant(model, teacher, recipe, first.x, first.t)

    def loss(v, batch, apply=apply, mimics=mimics):
      y, mine = features(apply, v, batch)
      off = jnp.square(y - batch.noise).mean()
      if not mimics:
        return off
      return off + mimic_loss(mine, features(model.apply, teacher, batch)[1], directions)

    trained = fit(loss, {**teacher, "quant": quant}, 5e-4, 600, seed + 50)
    found[f"order {order}{' + LRM' * mimics}"] = score(apply, trained)
  return found


def binarydm_section(seeds: Sequence[int]) -> str:
  """(b)"""
  arms = [binarydm_arms(seed) for seed in seeds]
  rows = [[name, *(f"{arm[name]:.4f}" for arm in arms)] for name in arms[0]]
  means = {name: statistics.mean(arm[name] for arm in arms) for name in arms[0]}
  gap = statistics.mean(arm["order 2 + LRM"] - arm["order 2"] for arm in arms)
  return (
    "## BinaryDM on eight Gaussians\n\nA denoising MLP (3 residual blocks, 64 and 128 wide, first "
    "and last layers in float), 2000 steps in float, then 600 with W1A4 from there. Mean squared "
    "error of the noise on 8192 held-out points.\n\n"
    + common.markdown(["training", *(f"seed {s}" for s in seeds)], rows)
    + "\n\n"
    + verdict(means["order 2"] < means["order 1"], "order 2 < order 1")
    + f" LRM at the released weight of 1e-4 changes the loss of order 2 by {gap:+.5f}: "
    + verdict(gap < 0, "order 2 + LRM < order 2")
  )


# --- operators -----------------------------------------------------------------------------------

CLASSES = 6  # of the next byte: lower, upper, digit, blank, newline, other
WINDOW = 16
WITHOUT = "no hidden layers"


def class_of(byte: np.ndarray) -> np.ndarray:
  """The class of each byte."""
  inside = lambda lo, hi: (byte >= ord(lo)) & (byte <= ord(hi))
  known = [inside("a", "z"), inside("A", "Z"), inside("0", "9"), byte == 32, byte == 10]
  return np.select(known, range(5), 5)


class Classifier(nn.Module):
  """The class of the byte after a window, [B, 16] -> [B, 6]; `hidden` layers are binarized."""

  layers: int = 3

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    h = nn.Embed(256, 16, name="embed")(tokens).reshape(len(tokens), -1)
    h = nn.LayerNorm(name="norm")(nn.Dense(128, name="head0")(h))
    for i in range(self.layers):
      h = h + nn.LayerNorm(name=f"norm{i}")(nn.Dense(128, name=f"hidden{i}")(nn.hard_tanh(h)))
    return nn.Dense(CLASSES, name="head1")(h)


def windows(split: str, seed: int, n: int) -> np.ndarray:
  """int32 [n, WINDOW + 1]: bytes, and the class of the one that follows."""
  tokens = getattr(data.load(), split)
  starts = np.random.default_rng(seed).integers(0, len(tokens) - WINDOW, n)
  found = tokens[starts[:, None] + np.arange(WINDOW + 1)].astype(np.int32)
  return np.concatenate([found[:, :-1], class_of(found[:, -1:])], 1)


def classify(
  recipe: Recipe | None, seeds: Sequence[int], steps: int = 400, layers: int = 3
) -> list[float]:
  """Held-out accuracy after training from scratch."""
  model, tx = Classifier(layers), optax.adam(optax.cosine_decay_schedule(1e-3, steps))
  apply = jax.jit(model.apply if recipe is None else jq.quantized(model, recipe))

  def loss_of(apply):
    def loss(variables, batch, rngs):
      logits = apply(variables, batch[:, :WINDOW], rngs=rngs)
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, WINDOW]).mean()

    return loss

  step = training.make_step(apply, tx, 0, recipe=recipe, loss_of=loss_of)
  found, test = [], windows("validation", 0, 8192)
  for seed in seeds:
    batches = windows("train", seed, 256 * steps).reshape(steps, 256, -1)
    state = training.init_state(model, tx, batches[0, :, :-1], seed, recipe)
    for batch in batches:
      state, _ = step(state, batch)
    guess = apply(state.variables, test[:, :-1]).argmax(-1)
    found.append(float((guess == test[:, -1]).mean()))
  return found


def operators_section(seeds: Sequence[int]) -> str:
  """(c)"""
  arms = {"float": None} | {n: bibench(n, steps=400, float_sites="embed|head.") for n in OPERATORS}
  found = {name: classify(recipe, seeds) for name, recipe in arms.items()}
  found[WITHOUT] = classify(None, seeds, layers=0)
  labels = windows("validation", 0, 8192)[:, -1]
  chance = np.bincount(labels).max() / len(labels)
  means = {name: statistics.mean(scores) for name, scores in found.items()}
  error = (means["bnn"] * (1 - means["bnn"]) / len(labels)) ** 0.5
  share = lambda n: (means[n] - means[WITHOUT]) / (means["float"] - means[WITHOUT])
  rows = [
    [
      name,
      *(f"{s:.4f}" for s in scores),
      f"{means[name] / means['float']:.4f}",
      f"{share(name):.2f}",
    ]
    for name, scores in found.items()
  ]
  below = [n for n in ("bireal", "react", "recu", "fda") if means[n] < means["bnn"]]
  overall = statistics.mean((means[n] / means["float"]) ** 2 for n in OPERATORS) ** 0.5
  ones = [means[n] for n in OPERATORS]
  return (
    "## BiBench's operators\n\nThe class of the next byte from 16 bytes of Python source (6 "
    "classes), an MLP of three residual layers 128 wide in one bit (W1A1), trained from scratch "
    "for 400 Adam steps of 256 windows. Accuracy on 8192 held-out windows (standard error "
    f"{error:.4f}); the commonest class has {chance:.4f}. The last column is what the binary "
    "layers add to the model without them, relative to what float layers add.\n\n"
    + common.markdown(
      ["operator", *(f"seed {s}" for s in seeds), "relative to float", "of what layers add"], rows
    )
    + f"\n\nRoot mean square of the relative accuracies: {overall:.4f}. "
    + verdict(min(ones) > chance, "That all beat the commonest class")
    + " "
    + verdict(min(ones) > means[WITHOUT], "That all beat the model without hidden layers")
    + " "
    + verdict(not below, "That Bi-Real, ReActNet, ReCU and FDA reach BNN")
    + (f" Below it: {', '.join(below)}." if below else "")
    + f" The best and the worst operator are {(max(ones) - min(ones)) / error:.1f} standard errors "
    "of one accuracy apart: read no order into rows that are closer than two."
  )


SECTIONS = {
  "gaussws": gaussws_section,
  "binarydm": binarydm_section,
  "operators": operators_section,
  "qvgen": qvgen_section,
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
  parser.add_argument("--seeds", type=int, default=2)
  parser.add_argument("--cache", default="out/qat", help="where sections are kept")
  parser.add_argument("--write", action="store_true", help="write docs/results/qat.md")
  args = parser.parse_args()
  cache = Path(args.cache)
  cache.mkdir(parents=True, exist_ok=True)
  bodies = []
  for name in args.only:
    path = cache / f"{name}_{args.seeds}.md"
    if not path.exists():
      path.write_text(SECTIONS[name](tuple(range(args.seeds))))
    bodies.append(path.read_text())
  body = "\n\n".join(bodies)
  print(body)
  if args.write:
    common.write("qat", "Quantization-aware training in the small", body)


if __name__ == "__main__":
  main()
