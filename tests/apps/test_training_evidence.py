"""The command that measures low-precision training: what it keeps, claims and holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import data
from jaxquant.apps import training_evidence as evidence
from jaxquant.apps.results import Results
from jaxquant.training_claims import CLAIMS, FLOAT, ORDERED, VARIANTS, Claim

SHAPE = {"vocab": 256, "d_model": 32, "n_layers": 1, "n_heads": 4, "d_ff": 32, "max_len": 16}
PLAN = evidence.Plan(seeds=2, steps=2, shape=SHAPE, held_out=1)
OUTLIERS = evidence.Arm("outliers", factor=16.0, recipes=(FLOAT, "nvfp4"))


def fake(loss):
  """What a run gives, without running."""
  return {"loss": loss, "train": [loss] * 10, "cpu_ms": 1.0}


@pytest.fixture
def counted(monkeypatch):
  """Runs that were made, as (recipe, seed)."""
  made = []

  class Trainer:
    def __init__(self, arm, name, plan, corpus):
      self.name = name

    def run(self, seed):
      made.append((self.name, seed))
      return fake(2.0 + len(self.name) + seed / 10)

  monkeypatch.setattr(evidence, "Trainer", Trainer)
  return made


def test_what_was_measured_is_not_measured_again(tmp_path, counted):
  path = tmp_path / "cache.jsonl"
  measure = lambda wanted, plan=PLAN: evidence.measured(
    OUTLIERS, plan, Results(path), data.load(), wanted, said=lambda text: None
  )
  assert list(measure(lambda name: name == FLOAT)) == [FLOAT]
  assert counted == [(FLOAT, 0), (FLOAT, 1)]
  whole = measure(lambda name: True)
  assert counted == [(FLOAT, 0), (FLOAT, 1), ("nvfp4", 0), ("nvfp4", 1)]
  assert measure(lambda name: False) == whole
  path.write_text(path.read_text()[:-20])  # killed while it wrote the last
  measure(lambda name: True)
  assert counted[4:] == [("nvfp4", 1)]
  measure(lambda name: True, evidence.Plan(seeds=1, steps=3, shape=SHAPE, held_out=1))
  assert counted[5:] == [(FLOAT, 0), ("nvfp4", 0)]  # other settings are other runs


def test_another_recipe_of_the_same_name_is_another_run():
  key = lambda arm, name: evidence.key_of(arm, name, PLAN, 0, "corpus")
  softmax, gla = evidence.ARMS["softmax"], evidence.ARMS["gla"]
  assert key(softmax, "chon")["recipe"] != key(gla, "chon")["recipe"]  # protects other sites
  assert key(softmax, "chon")["recipe"] != key(softmax, "chon_unpatched")["recipe"]
  assert key(softmax, "nvfp4")["recipe"] == key(OUTLIERS, "nvfp4")["recipe"]


def test_held_outliers_leave_the_float_function_and_gradient_as_they_are():
  model = evidence.model_of(OUTLIERS, PLAN)
  tokens = jnp.arange(16)[None] % 7
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  loss = lambda apply: lambda v: jnp.sin(apply(v, tokens)).sum()
  gradients = jax.jit(lambda v: [jax.value_and_grad(loss(f))(v) for f in (model.apply, held)])
  held = evidence.held(model.apply, model, 16.0)
  jax.tree.map(np.testing.assert_array_equal, *gradients(variables))  # 16 is a power of two


@pytest.mark.parametrize("arm", evidence.ARMS)
def test_claims_are_about_recipes_that_are_measured(arm):
  measured = set(evidence.runs(evidence.ARMS[arm], PLAN))
  assert {name for claim in CLAIMS[arm] for name in claim.names} <= measured
  assert measured <= {*ORDERED, *VARIANTS}


def runs_of(losses):
  """{recipe: a loss for each seed} -> what `measured` gives."""
  return {n: {s: fake(v) for s, v in enumerate(by)} for n, by in losses.items()}


@pytest.mark.parametrize(
  ("claim", "losses", "verdict", "why"),
  [
    (Claim("c", ("a",), ("b",)), {"a": [1, 1], "b": [2, 2]}, "passes", "holds in 2 of 2"),
    (Claim("c", ("a",), ("b",)), {"a": [1, 3.5], "b": [2, 2]}, "FAILS", "a 2.2500 is not below b"),
    (Claim("c", ("a",), ("b",)), {"a": [1, 2.5], "b": [2, 2]}, "passes", "holds in 1 of 2"),
    (Claim("c", ("a",), ("b",)), {"a": [1, 1]}, "not measured", "b"),
    (Claim("c", ("a",), ("b",), 1.03), {"a": [1.02], "b": [1]}, "passes", "holds in 1 of 1"),
    (Claim("c", ("a",), ("b",), 1.03), {"a": [1.04], "b": [1]}, "FAILS", "not below 1.03 b"),
    (Claim("c", ("a",), ("b",), judged=False), {"a": [2], "b": [1]}, "does not hold", "0 of 1"),
  ],
)
def test_a_claim_is_judged_by_the_mean_over_seeds(claim, losses, verdict, why):
  line = evidence.judged([claim], runs_of(losses)).splitlines()[-1]
  assert line.split(" | ")[1] == verdict
  assert why in line


def test_gaps_are_paired_by_seed():
  found = runs_of({FLOAT: [2.0, 3.0, 4.0], "nvfp4": [2.1, 3.1, 4.1]})
  gap = evidence.across_seeds(found, "nvfp4")
  assert gap.mean == pytest.approx(0.1)
  assert gap.half_width == pytest.approx(0, abs=1e-12)  # the seeds' spread of 1 drops out
  text = evidence.table(found)
  assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| `f32`", "| `nvfp4`"]
  assert "+0.1000 [+0.1000, +0.1000]" in text
