"""The evidence command: verdicts of every kind, and nothing measured twice."""

import dataclasses
import json

import pytest

from jaxquant import formats as F
from jaxquant.acceptance import ITEMS, Item, Probe, items, tables
from jaxquant.apps import evidence
from jaxquant.apps.results import Results, cost, fingerprint
from jaxquant.gates import Gate, pair
from jaxquant.recipes.weight_act import llm_int8
from jaxquant.recipes.weight_only import w4a16_gptq

TWO = {"int8": pair(None, F.INT8), "int4": pair(None, F.INT4)}


def breaks(*args):
  raise RuntimeError("no such luck")


TABLE = {
  "right": Gate("int8 < int4", TWO, lambda kl: kl["int8"] < kl["int4"]),
  "wrong": Gate("int4 < int8", TWO, lambda kl: kl["int4"] < kl["int8"]),
  "odd": Gate("int4 < int8", TWO, lambda kl: kl["int4"] < kl["int8"]),
  "bent": Probe("breaks", breaks, lambda v: True, "units"),
  "counted": Probe(
    "sums", lambda m, v, inputs, h: {"n": float(inputs[0].sum())}, lambda v: v["n"] > 0, "bytes"
  ),
}
LIST = (
  Item("1", "right"),
  Item("1", "wrong"),
  Item("2", "odd", report="it is odd"),
  Item("3", "bent"),
  Item("4", "nothing", "a claim of nobody"),
)


def test_every_verdict_and_no_second_measurement(tiny, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(evidence, "tables", lambda: TABLE)
  monkeypatch.setattr(evidence, "items", lambda gates: (*LIST, Item("more", "counted")))
  out, cache = tmp_path / "ptq.md", tmp_path / "cache.jsonl"
  argv = ["evidence", "--model", tiny, "--out", str(out), "--cache", str(cache), "--batches", "1"]
  argv += ["--calibration_batches", "1", "--seeds", "2"]
  assert evidence.main(argv) == 1  # wrong fails, bent is broken
  text = out.read_text()
  assert "Verdicts: 2 passes, 1 FAILS, 1 reported, 1 broken, 1 not built." in text
  assert "RuntimeError: no such luck" in text
  assert "no calibration, one measurement" in text
  assert "means of 2 draws; it holds in 2" in text  # the probe
  quoted = json.loads(out.with_suffix(".json").read_text())
  assert quoted["right"]["verdict"] == "passes"
  assert quoted["right"]["values"]["int8"] < quoted["right"]["values"]["int4"]
  assert quoted["nothing"] == {
    "claim": "a claim of nobody", "verdict": "not built", "unit": "", "values": {}
  }  # fmt: skip
  kept = [json.loads(line) for line in cache.read_text().splitlines()]
  assert len(kept) == 4  # two recipes without calibration once, one probe for each of two draws
  monkeypatch.setattr(evidence, "recipe_values", breaks)
  assert evidence.main([*argv, "--gates", "right,counted"]) == 1  # wrong failed before
  assert "Verdicts: 2 passes, 1 FAILS, 1 reported, 1 not measured, 1 not built." in out.read_text()
  with pytest.raises(SystemExit, match="--gates x: there are"):
    evidence.main([*argv, "--gates", "x"])


def test_what_determines_a_measurement():
  prints = [
    fingerprint(r)
    for r in (llm_int8(6.0), llm_int8(40.0), w4a16_gptq(), w4a16_gptq(damp=0.1), TWO["int8"])
  ]
  assert len(set(prints)) == len(prints)
  assert fingerprint(w4a16_gptq()) == fingerprint(w4a16_gptq())
  old = dataclasses.make_dataclass("D", [("a", object)])
  for off in (None, False):
    new = dataclasses.make_dataclass("D", [("a", object), ("part", object, off)])
    assert fingerprint(old(None)) == fingerprint(new(None)) != fingerprint(new(None, 0))
  assert fingerprint(old(None)) != fingerprint(old(False))


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
  path = tmp_path / "new" / "results.jsonl"
  Results(path).put({"b": 1, "a": 2}, {"x": 0.5})
  path.write_text(path.read_text() + '{"key": {"a"')
  again = Results(path)
  assert again.get({"a": 2, "b": 1}) == {"x": 0.5}
  assert again.get({"a": 3}) is None
  again.put({"a": 3}, {"x": 1.0})
  assert len(Results(path)) == 2


def test_cost_sees_the_memory_of_what_it_times():
  with cost() as small:
    pass
  with cost() as large:
    block = b"x" * 2**28
  assert large.peak_bytes - small.peak_bytes > 2**27
  assert large.seconds > 0
  del block


def test_the_list_names_what_exists():
  gates = tables()
  missing = {i.gate for i in ITEMS if i.gate and i.gate not in gates}
  assert all(i.wants for i in ITEMS if i.gate in missing or i.tests)
  assert {i.gate for i in items(gates)} >= set(gates)
  for item in ITEMS:
    for test in item.tests:
      path, name = test.split("::")
      with open(path) as source:
        assert f"def {name}(" in source.read()
