"""What a training run can have beside its recipe: a switch, a twin, spikes, a watch, devices."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from jaxquant import data, training
from jaxquant import state as quant_state
from jaxquant.apps import train
from jaxquant.apps.run_loop import phase_at, phase_of_checkpoint
from jaxquant.diagnostics import History
from jaxquant.formats import E4M3_TENSOR, E5M2_TENSOR, NVFP4, NVFP4_2D
from jaxquant.ops.qdot import FLOAT, Operand, Rule
from jaxquant.ops.tracked import Delayed, HotChannels
from jaxquant.paired import paired_gap
from jaxquant.recipe import Recipe
from jaxquant.rounding import stochastic
from jaxquant.spikes import Spikes, guarded

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
  """Resumed runs find the programs of the first on disk."""
  options = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def delayed():
  """Delayed fp8 in all six operands of one site, hot channels at another."""
  x, g = Operand(E4M3_TENSOR, Delayed(4)), Operand(E5M2_TENSOR, Delayed(4))
  hot = Rule(Operand(NVFP4), Operand(NVFP4_2D), patch=HotChannels(k=16, every=2))
  rules = ((".*mlp/down", hot), (".*mlp/gate", Rule(x, x, g, x, x, g)), (".*", FLOAT))
  return Recipe(rules, name="delayed")


def late():
  """What a run may end with: less state, of which a part is the same."""
  x, g = Operand(E4M3_TENSOR, Delayed(4)), Operand(E5M2_TENSOR)
  return Recipe(((".*mlp/gate", Rule(x, x, g, x, x, g)), (".*", FLOAT)), name="late")


def config(**changes):
  """A run of seconds."""
  shape = {
    "d_model": 32,
    "n_layers": 1,
    "scan": False,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 16,
    "d_ff": 32,
  }
  base = {
    "seed": 0, "steps": STEPS, "batch_size": 8, "seq_len": 32, "model": shape, "recipe": None,
    "optimizer": {"learning_rate": 1e-2, "warmup": 1, "weight_decay": 0.1, "clip": 1.0},
    "log_every": 1, "eval_every": 8, "eval_batches": 1, "checkpoint_every": 100, "keep": 2,
  }  # fmt: skip
  return ConfigDict(base | changes)


def rows(workdir):
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in found]


def everything():
  """Most optional parts at once, and a switch after 4 updates."""
  return config(
    recipe=delayed,
    accumulate=2,
    switch={"step": 4, "recipe": late},
    twin={"window": 40},
    spike={"window": 3, "threshold": 0.0, "skip": True},
  )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, train.run(everything(), workdir)


def test_a_run_with_all_parts_resumes_to_the_same_bits(tmp_path, whole, monkeypatch):
  """Interrupted at the switch and behind it."""
  batch = data.batch
  for moment in (3, 6):

    def interrupted(*args, step, moment=moment, **kwargs):
      if step == moment:
        signal.raise_signal(signal.SIGINT)
      return batch(*args, step=step, **kwargs)

    monkeypatch.setattr(data, "batch", interrupted)
    assert train.run(everything(), tmp_path).step == moment + 1
  monkeypatch.setattr(data, "batch", batch)
  chex.assert_trees_all_equal(train.run(everything(), tmp_path), whole[1])
  assert rows(tmp_path) == rows(whole[0])


def test_the_twin_is_a_float_run_on_the_same_batches(tmp_path, whole):
  """And a watch changes nothing."""
  train.run(config(accumulate=2, watch={"every": 3}), tmp_path)
  assert History(tmp_path).steps == [3, 6]
  alone, beside = rows(tmp_path), rows(whole[0])
  assert [r["loss"] for r in alone] == [r["twin_loss"] for r in beside]
  validated = [r.get("validation_loss") for r in alone]
  assert validated == [r.get("twin_validation_loss") for r in beside]
  gaps = [r["loss"] - r["twin_loss"] for r in beside]
  np.testing.assert_allclose([r["gap"] for r in beside], np.cumsum(gaps) / np.arange(1, STEPS + 1))
  assert any(gaps)


def test_spikes_are_counted_and_skipped(whole):
  """A threshold of zero: above the median of three is a spike."""
  logged = rows(whole[0])
  losses, count = [r["loss"] for r in logged], 0
  for i, loss in enumerate(losses):
    count += i >= 3 and loss > np.median(losses[i - 3 : i])
    assert logged[i]["spikes"] == count
  assert int(whole[1].step) == STEPS
  updates = int(jax.tree.leaves(whole[1].opt_state)[0])  # AdamW's own counter
  assert updates == STEPS - count


def test_state_of_the_same_form_is_carried_over_a_switch(whole):
  entry = whole[1].quant["layers_0"]["mlp"]["gate"]["state"]
  assert (np.asarray(entry["clock"]) > STEPS - 4).all()  # went on from before the switch
  assert set(whole[1].quant["layers_0"]) == {"mlp"}
  assert set(entry) == {"x", "w", "dgrad_w", "wgrad_x", "clock"}
  assert np.asarray(entry["x"]["history"]).all()


def test_carried_takes_whole_entries_or_none():
  entry = lambda n, value: {"history": np.full(n, value), "amax": np.float32(value)}
  tree = lambda n, value: {"q": {"state": {"x": entry(n, value), "clock": np.int32(value)}}}
  same = quant_state.carried(tree(4, 1), tree(4, 0))
  chex.assert_trees_all_equal(same, tree(4, 1))
  other = quant_state.carried(tree(3, 1), tree(4, 0))["q"]["state"]
  chex.assert_trees_all_equal(other["x"], entry(4, 0))
  assert other["clock"] == 1


@pytest.mark.parametrize(("step", "runs", "saved"), [(0, 0, 0), (3, 0, 0), (4, 4, 0), (5, 4, 4)])
def test_a_phase_begins_after_the_checkpoint_at_its_step(step, runs, saved):
  phase = type("Phase", (), {})
  phases = []
  for start in (0, 4):
    phases.append(phase())
    phases[-1].start = start
  assert phase_at(phases, step).start == runs
  assert phase_of_checkpoint(phases, step).start == saved


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"switch": {"step": 0, "recipe": None}}, r"switch\.step is 0"),
    ({"devices": 1000}, r"config\.devices is 1000; this host has"),
    ({"devices": 4, "accumulate": 4}, r"2 rows of a \(micro\)batch"),
    ({"spike": {"window": 2}}, "take 3 or more"),
  ],
)
def test_impossible_configs_are_refused(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    train.run(config(**changes), tmp_path)


def test_a_spike_leaves_the_state_as_it_was():
  @jax.jit
  def step(state, batch):
    after = state.replace(step=state.step + 1, params=state.params + batch.sum())
    return after, {"loss": batch.max()}

  run = guarded(step, Spikes(window=3, skip=True))
  state = training.TrainState(jnp.int32(0), jnp.float32(0), ())
  seen = Spikes(window=3).init()
  for batch in (1.0, 2.0, 3.0, 100.0, 1.0, float("nan"), 2.0):
    state, seen, metrics = run(state, seen, jnp.full(2, batch))
  assert (float(state.params), int(state.step)) == (18.0, 7)
  assert {k: int(metrics[k]) for k in ("spikes", "spike_at")} == {"spikes": 2, "spike_at": 6}


def coverage(interval, correlation, n=1000, runs=400):
  """How often an interval holds the mean, 0, of a first-order autoregressive series."""
  noise = np.random.default_rng(0).standard_normal((runs, n))
  series = np.empty_like(noise)
  series[:, 0] = noise[:, 0] / np.sqrt(1 - correlation**2)
  for i in range(1, n):
    series[:, i] = correlation * series[:, i - 1] + noise[:, i]
  found = [interval(row) for row in series]
  return np.mean([abs(mean) <= half for mean, half in found])


def test_the_interval_of_batch_means_knows_of_autocorrelation():
  ours = lambda d: paired_gap(d)[:2]
  naive = lambda d: (d.mean(), 1.96 * d.std(ddof=1) / np.sqrt(d.size))
  # 400 draws of a probability of .95 have a deviation of .011.
  assert 0.91 < coverage(ours, 0.0) < 0.99
  assert 0.91 < coverage(ours, 0.8) < 0.99
  assert coverage(naive, 0.8) < 0.6


def everywhere():
  """Delayed scales, hot channels, and stochastic NVFP4 with blocks along the tokens."""
  sr = Operand(NVFP4, rounding=stochastic)
  nvfp4 = Rule(Operand(NVFP4), Operand(NVFP4_2D), sr, Operand(NVFP4_2D), Operand(NVFP4), sr)
  return Recipe(((".*mlp/up", nvfp4), *delayed().rules), name="everywhere")


EIGHT = """
import pathlib, sys
import jax, optax, numpy as np
from flax.traverse_util import flatten_dict
import test_train_run as t

for devices in (1, 8):
  config = t.config(recipe=t.everywhere, devices=devices, steps=2)
  parts = t.train.Training(config, t.data.load())
  run, losses = t.train.Run.of(parts.fresh(0)), []
  for i in range(2):
    run, scalars = parts.phases[0].step(run, parts.batch(i))
    losses.append(scalars["loss"])
  assert all(len(a.sharding.device_set) == devices for a in jax.tree.leaves(run))
  # A sum of gradients: Adam's update is about their signs.
  found = {"mu": optax.tree.get(run.state.opt_state, "mu"), "quant": run.state.quant}
  found = flatten_dict(found | {"loss": np.stack(losses)}, sep="/")
  np.savez(sys.argv[1] + f"/{devices}.npz", **{k: np.asarray(a) for k, a in found.items()})
"""


def test_eight_devices_compute_what_one_does(tmp_path):
  """Each of them has a row of the batch."""
  flags = "--xla_force_host_platform_device_count=8"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-c", EIGHT, str(tmp_path)]
  done = subprocess.run(
    command, cwd=pathlib.Path(__file__).parent, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  one, eight = (dict(np.load(tmp_path / f"{n}.npz")) for n in "18")
  assert one.keys() == eight.keys()
  assert one["loss"][0] == eight["loss"][0]
  for name, a in one.items():
    if name.startswith("mu/"):
      # Sums over the batch in another order; where that moves an element of a gradient over a
      # rounding boundary, by a step of its grid. Other noise or scales per shard would be .1.
      np.testing.assert_allclose(eight[name], a, rtol=0, atol=1e-2 * np.abs(a).max(), err_msg=name)
    elif name.endswith(("index", "clock")):
      np.testing.assert_array_equal(eight[name], a, err_msg=name)
    else:  # maxima over all devices, of numbers that differ in the order of their sums
      np.testing.assert_allclose(eight[name], a, rtol=1e-6, err_msg=name)
