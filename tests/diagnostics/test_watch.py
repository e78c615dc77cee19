"""Rows of a run: kept, continued after a kill, and drawn."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.diagnostics import History, Row, Watch, dynamics, page, plots


def row(step, rng=None):
  """Two layers; channels 0 to 3 are hot up to step 20, others after it."""
  rng = rng or np.random.default_rng(step)
  hot = np.arange(4) + (0 if step <= 20 else 2)
  outliers = {
    "kurtosis": rng.normal(size=2),
    "crest_p99": rng.uniform(1, 4, size=2),
    "flushed": rng.uniform(size=2),
    "hot": np.stack([hot, hot]),
  }
  spectrum = np.sort(rng.uniform(1, 2, size=(1, 8)))[:, ::-1]
  one = np.ones(1)
  embedding = {
    "spectrum": spectrum, "spectrum_quantized": spectrum * 1.1, "floor": one, "edge": one,
    "below_edge": 0.6 * one, "stable_rank": one, "fidelity": one,
  }  # fmt: skip
  return Row(
    step,
    {"layers/mlp/down/x": outliers, "embed/w": embedding, "layers/attn/softmax": {"entropy": one}},
  )


@pytest.fixture
def history(tmp_path):
  history = History(tmp_path, start=0)
  for step in (0, 10, 20, 30):
    history.append(row(step))
  return history


def test_rows_come_back_as_they_were(history):
  for got, step in zip(history, (0, 10, 20, 30), strict=True):
    wanted = row(step)
    assert got.step == step
    jax.tree.map(np.testing.assert_array_equal, dict(got.values), dict(wanted.values))
  assert history.series("layers/mlp/down/x", "hot").shape == (4, 2, 4)


def test_a_continued_run_drops_later_rows_and_halves(history, tmp_path):
  (tmp_path / "taps" / "00000040.tmp").write_bytes(b"cut off")
  assert History(tmp_path).steps == [0, 10, 20, 30]  # reading changes nothing
  again = History(tmp_path, start=10)
  again.append(row(20))
  again.append(row(20))
  assert again.steps == [0, 10, 20]
  assert not list((tmp_path / "taps").glob("*.tmp"))


def test_a_missing_measure_says_what_there_is(history):
  with pytest.raises(ValueError, match=r"embed/w:entropy is not in the row of step 0.*'spectrum'"):
    history.series("embed/w", "entropy")


def test_watch_measures_every_nth_step_with_one_compilation():
  traces = []

  def measure(a):
    traces.append(1)
    return {"sum": a.sum()}

  model, x = nn.Dense(3), jnp.ones((2, 4))
  loss_of = lambda apply: lambda variables, x, rngs: apply(variables, x).sum()
  watch = Watch(model, None, every=5, rules=(("x", measure),), loss_of=loss_of)
  variables = model.init(jax.random.key(0), x)
  rows = [watch(step, variables, step * x, {}) for step in range(1, 11)]
  assert [r.step for r in rows if r] == [5, 10]
  assert [r.values["x"]["sum"].tolist() for r in rows if r] == [[40.0], [80.0]]
  assert len(traces) == 1
  with pytest.raises(ValueError, match="every must be at least 1"):
    Watch(model, None, every=0)


def test_persistence_and_hit_rate_see_the_move():
  sets = np.stack([row(step).values["layers/mlp/down/x"]["hot"] for step in (0, 10, 20, 30, 40)])
  np.testing.assert_allclose(dynamics.persistence(sets)[:, 0], [1, 1, 1 / 3, 1])
  np.testing.assert_allclose(dynamics.persistence(sets, lag=2)[:, 0], [1, 1 / 3, 1 / 3])
  np.testing.assert_allclose(dynamics.hit_rate(sets)[:, 0], [1, 1, 0.5, 0.5])
  # With a short memory, the past is the row before.
  np.testing.assert_allclose(dynamics.hit_rate(sets, decay=0.0)[:, 0], [1, 1, 0.5, 1])


def test_the_section_shows_all_of_it(history, tmp_path):
  section = dynamics.section(history)
  html = page("Run", "x", [section], {})
  for text in (
    "layers/mlp/down/x", "Excess kurtosis of inputs", "Share flushed to zero of inputs",
    "Entropy in nats of attention", "overlap with the row before", "foretells", "where they change",
    "Spectrum of embed/w: 60% of it below the edge. More than half: an alarm.", "stable rank",
  ):  # fmt: skip
    assert text in html, text
  assert html.count("<svg") == sum(type(item).__name__ == "Plot" for item in section.items) == 10
  figure = dynamics.heat_maps([0, 10], {"a": np.array([[0.0, 1], [2, 300]])}, "label")
  assert plots.to_svg(figure) == plots.to_svg(
    dynamics.heat_maps([0, 10], {"a": np.array([[0.0, 1], [2, 300]])}, "label")
  )


def test_one_row_is_enough_and_none_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="no rows"):
    dynamics.section(History(tmp_path, start=0))
  History(tmp_path).append(row(0))
  assert "<svg" in page("Run", "x", [dynamics.section(History(tmp_path))], {})
  assert json.dumps(History(tmp_path).steps) == "[0]"
