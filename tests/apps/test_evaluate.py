"""The evaluate app: one table of all recipes."""

import json
import re

import jax.numpy as jnp
import pytest

from jaxquant.apps import evaluate, leaderboard
from jaxquant.models.stored import read


def test_the_table_and_its_json(tiny, tmp_path, capsys):
  path = tmp_path / "new" / "rows.json"
  argv = ("--model", tiny, "--batches", "2", "--calibration_batches", "1", "--json", str(path))
  argv = (*argv, "--out", str(tmp_path / "out"), "--table", str(tmp_path / "docs" / "it.md"))
  evaluate.main(["evaluate", *argv, "--recipes", "w8a8_int8,w4a16_rtn"])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[2:5]] == ["float32", "w8a8_int8", "w4a16_rtn"]
  assert re.search(r"float32 +- +32\.000 .* 100\.00 %", lines[2])
  rows = json.loads(path.read_text())
  assert [row["recipe"] for row in rows] == ["float32", "w8a8_int8", "w4a16_rtn"]
  kl = [row["scores"]["kl"] for row in rows]
  assert kl[0] == 0 < kl[1] < kl[2]
  assert all(row["bits"] < 10 for row in rows[1:])
  assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)
  assert rows[1]["sites"][0]["path"] == "layers/attn/q"
  assert rows[0]["scores"]["tokens"] == 2 * 8 * 32
  text = (tmp_path / "docs" / "it.md").read_text()
  assert "(it.svg)" in text
  assert "| w4a16_rtn |" in text
  assert (tmp_path / "docs" / "it.svg").read_text().startswith("<svg")


def test_a_recipe_that_does_not_work_does_not_stop_the_others(tiny):
  source = read(tiny)
  broken = {"params": dict(source.variables["params"])}
  broken["params"]["head"] = {"kernel": jnp.full((32, 256), jnp.nan)}
  packed, failed = evaluate.try_pack(source, ["w4a16_rtn"], 1, 0)
  assert list(packed) == ["w4a16_rtn"]
  assert not failed
  broken["params"]["layers"] = {
    **source.variables["params"]["layers"],
    "mlp": {k: {"kernel": v["kernel"] * jnp.nan} for k, v in _mlp(source).items()},
  }
  packed, failed = evaluate.try_pack(source._replace(variables=broken), ["w4a16_rtn"], 1, 0)
  assert not packed
  assert "layers/mlp/gate: the weight has NaN" in failed["w4a16_rtn"]


def _mlp(source):
  return source.variables["params"]["layers"]["mlp"]


def test_unknown_recipes_are_answered_in_words(tiny):
  with pytest.raises(SystemExit, match="no recipe 'x'"):
    evaluate.main(["evaluate", "--model", tiny, "--recipes", "nvfp4,x", "--out", ""])


def test_a_killed_leaderboard_goes_on_and_a_broken_recipe_is_a_row(
  tiny, tmp_path, monkeypatch, capsys
):
  def breaks(*args, **options):
    raise RuntimeError("no such luck")

  def run(*names):
    argv = ("--model", tiny, "--batches", "1", "--out", str(tmp_path), "--metrics", "--sites")
    evaluate.main(["evaluate", *argv, "--recipes", ",".join(names)])

  run("w4a16_rtn")
  kept = (tmp_path / "results.jsonl").read_text()
  (tmp_path / "results.jsonl").write_text(kept + kept.splitlines()[-1][:40])  # cut off
  monkeypatch.setattr(leaderboard, "pack", lambda *a, **k: pytest.fail("was measured already"))
  capsys.readouterr()
  run("w4a16_rtn")
  first = capsys.readouterr().out
  assert "w4a16_rtn" in first
  monkeypatch.setattr(leaderboard, "pack", breaks)
  with pytest.raises(SystemExit):
    run("nvfp4", "w4a16_rtn")
  out = capsys.readouterr()
  assert "RuntimeError: no such luck" in out.out
  assert "w4a16_rtn" in out.out
  page = (tmp_path / "leaderboard.html").read_text()
  assert page.count("<svg") == 3  # KL against bits, single sites, temperatures
  assert "tau@10" in (tmp_path / "leaderboard.md").read_text()
