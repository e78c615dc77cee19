"""The quantize app: equal inputs give equal files, and the files say where they come from."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from apps.test_train import tiny as shortened
from jaxquant import checkpoint
from jaxquant.apps import command, quantize, train
from jaxquant.models.stored import read


def run(*argv):
  quantize.main(["quantize", *map(str, argv)])


def files(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["nvfp4", "w4a16_gptq"])
def test_the_same_command_writes_the_same_bytes(tiny, tmp_path, recipe):
  for name in ("a", "b"):
    out = tmp_path / name
    run("--model", tiny, "--recipe", recipe, "--out", out, "--calibration_batches", 2)
  assert files(tmp_path / "a") == files(tmp_path / "b")
  assert checkpoint.digest(tmp_path / "a") == checkpoint.digest(tmp_path / "b")


def test_the_seed_chooses_the_calibration_text(tiny, tmp_path):
  for seed in (0, 1):
    arguments = ("--out", tmp_path / str(seed), "--calibration_batches", 1, "--seed", seed)
    run("--model", tiny, "--recipe", "w4a16_gptq", *arguments)
  assert checkpoint.digest(tmp_path / "0") != checkpoint.digest(tmp_path / "1")


def test_tables_and_provenance(tiny, tmp_path, capsys):
  run("--model", tiny, "--recipe", "w4a16_rtn", "--out", tmp_path / "q")
  said = capsys.readouterr()
  row = r"layers/mlp/down +dense_general +2 +\[64, 32\] +float +\w+ +w int4_g128"
  assert re.search(row, said.out)
  assert re.search(r"layers/mlp/down +int4_g128 +4\.\d+ +[\d,]+ +0\.\d+ +0\.\d+", said.out)
  assert "x smaller" in said.out
  assert re.search(r"w4a16_rtn: 100%.*site/s", said.err)
  about = read(tmp_path / "q").about
  assert about["recipe"] == "w4a16_rtn"
  assert "w int4_g128" in about["recipe_text"]
  assert about["seed"] == 0
  assert about["jaxquant"] == jq.__version__
  assert len(about["model_digest"]) == 64
  assert about["model"] == {"name": "tiny"}


def test_packed_files_hold_packed_weights(tiny, tmp_path):
  run("--model", tiny, "--recipe", "w8a8_int8", "--out", tmp_path / "q")
  source, packed = command.open_model(tiny), command.open_model(str(tmp_path / "q"))
  kernel = packed.variables["params"]["layers"]["mlp"]["up"]["kernel"]
  assert isinstance(kernel, jq.QTensor)
  assert kernel.packed
  apply = jax.jit(jq.quantized(packed.model, command.recipe_of(packed)))
  tokens = jnp.arange(16).reshape(2, 8)
  outputs = [apply(s.variables, tokens, rngs={"sr": jax.random.key(0)}) for s in (source, packed)]
  np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (("--recipe", "w5a5", "--out", "x"), "no recipe 'w5a5'"),
    (("--recipe", "nvfp4"), "--out is missing"),
    (("--model", "/nowhere", "--out", "x"), "nowhere"),
    (("--calibration_batches", "0", "--out", "x"), "calibration_batches"),
    (("--colour", "blue"), "colour"),
    (("what",), "Not understood: what"),
  ],
)
def test_mistakes_are_answered_in_words(argv, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match=message):
    run(*argv)


def test_nothing_is_overwritten_or_packed_twice(tiny, tmp_path):
  run("--model", tiny, "--recipe", "w4a16_rtn", "--out", tmp_path / "q")
  with pytest.raises(SystemExit, match="exists"):
    run("--model", tiny, "--recipe", "w4a16_rtn", "--out", tmp_path / "q")
  with pytest.raises(SystemExit, match="packed already"):
    run("--model", tmp_path / "q", "--recipe", "w4a16_rtn", "--out", tmp_path / "again")


def test_a_recipe_that_changed_since_is_refused(tiny, tmp_path):
  run("--model", tiny, "--recipe", "w4a16_rtn", "--out", tmp_path / "q")
  found = read(tmp_path / "q")
  found.about["recipe_text"] = "w4a16_rtn: another solver"
  with pytest.raises(ValueError, match="has changed since"):
    command.recipe_of(found)


@pytest.mark.parametrize("name", ["quantize", "decode", "evaluate", "evidence", "report", "demo"])
def test_help_names_every_flag_and_an_example(name, capsys):
  module = __import__(f"jaxquant.apps.{name}", fromlist=["main"])
  with pytest.raises(SystemExit) as end:
    module.main([name, "--help"])
  assert end.value.code == 0
  text = capsys.readouterr().out
  assert f"python -m jaxquant.apps.{name}" in text
  for flag in set(module.FLAGS) - {"flagfile", "undefok"}:
    assert re.search(rf"^  --{flag}\n      \S", text, re.MULTILINE), flag


def test_a_training_workdir_is_a_model(tmp_path):
  state = train.run(shortened(steps=2, checkpoint_every=2, optimizer={"warmup": 1}), tmp_path)
  found = command.open_model(str(tmp_path))
  assert found.about["step"] == 2
  assert found.about["config"]["seq_len"] == 32
  chex.assert_trees_all_equal(found.variables["params"], jax.device_get(state.params))
