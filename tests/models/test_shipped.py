"""The shipped model is what its provenance says, and an export of a run is reproducible."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import checkpoint, data
from jaxquant.evaluation import Candidate, evaluate
from jaxquant.models import Transformer, TransformerShape, shipped
from jaxquant.models.stored import Stored, digest, read, shape_to_json, write


def test_it_loads_in_float32_and_is_what_was_trained():
  model, variables = shipped.load()
  about = shipped.stored().about
  assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  assert sum(a.size for a in jax.tree.leaves(variables)) == about["parameters"]
  assert digest(variables) == about["digest"]
  assert model.shape.max_len == 256
  for key in ("command", "config", "corpus", "date", "jax", "steps", "held_out"):
    assert about[key]


def test_it_is_small_and_its_json_says_the_same():
  files = [p for p in shipped.ASSET.rglob("*") if p.is_file()]
  assert sum(p.stat().st_size for p in files) <= shipped.LARGEST
  about = checkpoint.read_manifest(shipped.ASSET)["metadata"]
  about.pop("shape"), about.pop("architecture", None)
  assert json.loads(shipped.ASSET.with_suffix(".json").read_text()) == about


def test_it_predicts_held_out_source():
  model, variables = shipped.load()
  one = Candidate(model.apply, variables)
  batches = data.eval_batches(data.load(), 4, model.shape.max_len, 2)
  loss = evaluate(one, {"float": one}, batches)["float"].loss
  # 2048 bytes stand for 172032, on a standard library that may be of another version.
  assert loss == pytest.approx(shipped.stored().about["held_out"]["validation"]["loss"], abs=0.3)


def test_models_round_trip(tmp_path):
  shape = TransformerShape(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16)
  shape = TransformerShape(**shape_to_json(shape))
  model = Transformer(shape)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  write(tmp_path / "m", Stored(model, variables, {"name": "m"}))
  found = read(tmp_path / "m")
  assert found.model == model
  assert found.about == {"name": "m"}
  jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
  assert digest(found.variables) == digest(variables)
  checkpoint.save(tmp_path / "other", {"x": jnp.ones(3)})
  with pytest.raises(checkpoint.CheckpointError, match="no model shape"):
    read(tmp_path / "other")
