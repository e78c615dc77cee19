"""Steps for a pod: what they compute on four CPU devices, and what libtpu makes of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

import jaxquant as jq
from jaxquant import aot, pod, training
from jaxquant.apps import pod as app
from jaxquant.cache import init_cache
from jaxquant.models import Transformer, TransformerShape
from jaxquant.recipes.training import nvfp4, w8a8_int8
from jaxquant.recipes.weight_only import w4a16_rtn

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "pod_llama8b_nvfp4.py"
MODEL = {
  "n_layers": 2, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ff": 512,
  "vocab": 512, "max_len": 64, "attn_chunk": 32, "loss_chunk": 32,
}  # fmt: skip
SIZES = {"tp": 2, "batch_size": 4, "seq_len": 64, "decode.batch_size": 4, "decode.context": 64}
SMALL = {f"model.{name}": value for name, value in MODEL.items()} | SIZES


def config(**changes):
  flag = config_flags.DEFINE_config_file  # reads the file as the command line does
  holder = flag("config", str(CONFIG), flag_values=app.flags.FlagValues(), sys_argv=[])
  holder._flagvalues.mark_as_parsed()
  found = holder.value
  found.update_from_flattened_dict(changes)
  return found


def tiny(**changes):
  return config(**SMALL, **{"model.dtype": "float32"}, **changes)


@pytest.fixture(scope="module")
def mesh():
  return pod.pod_mesh(jax.devices()[:4], tp=2)


# Shapes and shardings.


@pytest.mark.parametrize("recipe", [w4a16_rtn(float_sites="embed"), nvfp4()])
def test_abstract_variables_are_those_of_quantize_params(recipe):
  model, tokens = Transformer(TransformerShape(**MODEL)), jnp.zeros((1, 8), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  packed = jq.quantize_params(model, variables, recipe, example=tokens, progress=False)
  chex.assert_trees_all_equal_shapes_and_dtypes(pod.abstract_variables(model, recipe), packed)


def test_the_8b_config_is_8b_and_costs_nothing(mesh):
  """Parameters as in arXiv:2407.21783; packed kernels take 4.25 bits and the rest bf16."""
  state, batch = pod.train_program(config(), nvfp4(), mesh).args
  leaves = jax.tree.leaves(state.params)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((state, batch)))
  assert sum(x.size for x in leaves) == 8_030_261_248
  assert {x.dtype.name for x in leaves} == {"float32"}
  moments = [x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sorted(set(moments)) == ["bfloat16", "float32"]
  variables = pod.decode_program(config(), w4a16_rtn(), mesh).args[0]
  kernels = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
  rest = 8_030_261_248 - kernels
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(variables))
  assert size == kernels * 4.25 / 8 + rest * 2


EXPECTED = {  # path -> shards of a parameter and its moments, then of a packed kernel
  "layers/attn/q": (P(None, "data", "tp", None), P(None, None, "tp")),
  "layers/attn/o": (P(None, "tp", None, "data"), P(None, "tp", None)),
  "layers/mlp/gate": (P(None, "data", "tp"), P(None, None, "tp")),
  "layers/mlp/down": (P(None, "tp", "data"), P(None, "tp", None)),
}


@pytest.mark.parametrize("path", EXPECTED)
def test_parameters_moments_and_packed_kernels_lie_alike(mesh, path):
  at = lambda tree: tree[(p := path.split("/"))[0]][p[1]][p[2]]["kernel"]
  train, decode = EXPECTED[path]
  state = pod.train_program(tiny(), None, mesh).args[0]
  is_adam = lambda x: hasattr(x, "mu")
  adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
  for tree in (state.params, adam.mu, adam.nu):
    assert at(tree).sharding.spec == train
  q = at(pod.decode_program(tiny(), w4a16_rtn(), mesh).args[0]["params"])
  assert (q.data.sharding.spec, q.scale.sharding.spec) == (decode, decode)


WRONG = {
  "a block": ({"model.d_ff": 384}, r"K=384, 2 shards: .* 192 .*block of 128"),
  "heads": ({"model.n_kv_heads": 1}, "n_kv_heads=1 is not a multiple of the 2 devices along 'tp'"),
  "rows": ({"decode.batch_size": 3}, "batch=3 is not a multiple of the 2 devices along 'data'"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_sizes_that_do_not_divide_are_refused(mesh, changes, message):
  with pytest.raises(ValueError, match=message):
    pod.decode_program(config(**{**SMALL, **changes}), w4a16_rtn(), mesh)


def test_unknown_parameters_and_uneven_meshes_are_refused(mesh):
  with pytest.raises(ValueError, match=r"adapter/kernel: LAYOUT of jaxquant.pod has no sharding"):
    pod.place({"adapter": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}, mesh)
  with pytest.raises(ValueError, match="tp=3 does not divide 4 devices"):
    pod.pod_mesh(jax.devices()[:4], tp=3)


# What the steps compute.


def relative(found, wanted):
  """Differences of the loss, of the norm of all gradients, and the largest of an array's norm."""
  (state, metrics), (other, others) = found, wanted
  norms = [jax.tree.map(jnp.linalg.norm, [jnp.float32(x).ravel() for x in jax.tree.leaves(s)])
           for s in (state, other)]  # fmt: skip
  pairs = [(metrics[k], others[k]) for k in ("loss", "grad_norm")]
  loss, grad_norm = (abs(float(a) / float(b) - 1) for a, b in pairs)
  return loss, grad_norm, max(abs(float(a) / float(b) - 1) for a, b in zip(*norms) if b > 0)


def an_ulp_off(state, seed):
  """A state half of whose parameters are the next larger float32."""
  up = lambda x: jax.random.bernoulli(jax.random.key(seed), 0.5, x.shape) * 2.0**-23
  return state.replace(params=jax.tree.map(lambda x: x * (1 + up(x)), state.params))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", [nvfp4(), None], ids=["nvfp4", "float"])
def test_the_sharded_step_in_chunks_is_the_plain_step(mesh, recipe):
  """Sums across shards and chunks come in another order, so last bits of float32 differ.

  Without rounding that is all. Under NVFP4 a last bit moves elements to the next point of the grid,
  so the step may be off by what last bits of the parameters do to the plain one, and not more.
  """
  c = tiny()
  program = pod.train_program(c, recipe, mesh)
  model = Transformer(TransformerShape(**{**c.model, "attn_chunk": None, "loss_chunk": None}))
  tx = training.optimizer(c.steps, **c.optimizer)
  tokens = jax.random.randint(jax.random.key(1), (4, 65), 0, 512)
  start = training.init_state(model, tx, tokens[:, :-1], c.seed)
  fresh = lambda: jax.tree.map(jnp.copy, start)  # steps donate what they get
  run = model.apply if recipe is None else jq.quantized(model, recipe)
  step = training.make_step(run, tx, c.seed)
  plain = step(fresh(), tokens)
  args = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), (fresh(), tokens), program.args)
  with jax.set_mesh(mesh):
    sharded = program.step(*args)
  allowed = (1e-6, 1e-5, 1e-5)
  if recipe is not None:
    moved = [relative(step(an_ulp_off(fresh(), seed), tokens), plain) for seed in range(4)]
    allowed = np.max(moved, axis=0)
  assert (np.array(relative(sharded, plain)) <= allowed).all()
  for x, spec in zip(jax.tree.leaves(sharded[0]), jax.tree.leaves(program.args[0])):
    assert x.sharding.is_equivalent_to(spec.sharding, x.ndim)


def test_the_sharded_decode_step_is_the_plain_one(mesh):
  c = tiny()
  program = pod.decode_program(c, w4a16_rtn(), mesh)
  model = Transformer(TransformerShape(**c.model))
  tokens = jax.random.randint(jax.random.key(1), (4, 1), 0, 512)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  packed = jq.quantize_params(model, variables, w4a16_rtn(), example=tokens, progress=False)
  cache = init_cache(model.shape, 4, 64)
  logits, _ = jax.jit(jq.quantized(model, w4a16_rtn()))(packed, tokens, cache=cache)
  put = lambda x, s: jax.device_put(x, s.sharding)
  args = jax.tree.map(put, (packed, tokens[:, 0], cache), program.args)
  with jax.set_mesh(mesh):
    got, grown = program.step(*args)
  np.testing.assert_array_equal(got, logits[:, 0].argmax(-1))
  np.testing.assert_array_equal(grown.length, 1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tied", [True, False])
def test_losses_by_chunks_quantize_the_head_too(tied):
  """Scales are per token, so a chunk sees what the whole sees; sums may differ in their order."""
  recipe = w8a8_int8(float_sites="embed") if not tied else w8a8_int8(float_sites="none|layers/.*")
  tokens = jax.random.randint(jax.random.key(1), (2, 65), 0, 512)
  make = lambda **changes: Transformer(TransformerShape(**{**MODEL, "tied": tied, **changes}))
  params = jax.jit(make().init)(jax.random.key(0), tokens[:, :8])["params"]

  def losses(model, recipe):
    apply = jq.quantized(model, recipe)
    return jax.jit(lambda p: apply({"params": p}, tokens[:, :-1], targets=tokens[:, 1:]))(params)

  want = losses(make(loss_chunk=None), recipe)
  np.testing.assert_allclose(losses(make(), recipe), want, rtol=1e-6)
  assert np.abs(losses(make(), jq.Recipe()) - want).max() > 1e-4  # the head did get quantized


@pytest.mark.parametrize("name", ["attn_chunk", "loss_chunk"])
def test_a_part_of_a_chunk_is_refused(name):
  model = Transformer(TransformerShape(**{**MODEL, name: 24}))
  tokens = jnp.zeros((1, 64), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens[:, :8])
  with pytest.raises(ValueError, match=f"64 tokens are not a multiple of {name}=24"):
    jax.eval_shape(lambda v: model.apply(v, tokens, targets=tokens), variables)


# What the compiler says.

HLO = """HloModule m
%body (p: f32[8]) -> f32[8] {
  %g.1 = bf16[64,32]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  %f = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
}
%fused (p: f32[8]) -> f32[8] {
  %g.2 = bf16[64,32]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  ROOT %r = (f32[8]{0}, s8[4]{0}) all-reduce(%p, %p), channel_id=2, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(%p), condition=%cond, body=%body
  %s = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), channel_id=3
  %d = f32[16]{0} all-gather-done(%s)
  ROOT %c = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%p), channel_id=4
}
"""


def test_collectives_are_read_from_the_program():
  assert aot.collectives(HLO) == (
    aot.Collective("all-gather", "bf16", 64 * 32 * 2, looped=True),  # two steps of one channel
    aot.Collective(
      "all-reduce", "f32+s8", 8 * 4 + 4, looped=True
    ),  # in a fusion that the loop calls
    aot.Collective("all-gather", "f32", 16 * 4, looped=False),
    aot.Collective("collective-permute", "f32", 8 * 4, looped=False),
  )
  assert aot.summary(aot.collectives(HLO)) == "2 all-gather, 1 all-reduce, 1 collective-permute"
  assert aot.summary(()) == "none"


def command(*argv, **changes):
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("no compiler for TPUs: pip install jaxquant[tpu-aot]")
  fields = [f"--config.{name}={value}" for name, value in {**SMALL, **changes}.items()]
  run = [sys.executable, "-m", "jaxquant.apps.pod", f"--config={CONFIG}", *argv, *fields]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.run(
    run, capture_output=True, text=True, env=env, cwd=ROOT, timeout=300, check=False
  )


def test_both_steps_compile_for_tpus(tmp_path):
  results = tmp_path / "pod.md"
  found = command("--topology=v5e:2x2", "--what=train,decode", f"--results={results}")
  assert found.returncode == 0, found.stderr[-3000:]
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in results.read_text().splitlines()]
  rows = [dict(zip(app.COLUMNS, row)) for row in cells if len(row) == len(app.COLUMNS)][2:]
  assert [row["step"] for row in rows] == ["train nvfp4", "decode w4a16_rtn"]
  for row in rows:
    assert row["fits"] == "yes"
    assert 0 < float(row["arguments GiB"]) < float(row["peak GiB"]) < float(row["limit GiB"])
    assert "all-reduce" in row["collectives"]
  assert "train nvfp4" in found.stdout


def test_what_does_not_fit_is_reported():
  large = {"decode.batch_size": 4096, "decode.context": 65536}
  found = command("--topology=v5e:2x2", "--what=decode", **large)
  assert found.returncode == 1
  assert "decode w4a16_rtn does not fit v5e:2x2: Ran out of memory on HBM" in found.stderr
  assert "available HBM" in found.stderr
  assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
  ("argv", "changes", "message"),
  [
    (("--topology=v5e:3x7",), {}, "libtpu knows no topology 'v5e:3x7'"),
    (("--topology=v5e:2x2",), {"tp": 3}, "tp=3 does not divide 4 devices"),
  ],
)
def test_wrong_command_lines_are_answered_plainly(argv, changes, message):
  found = command("--what=decode", *argv, **changes)
  assert found.returncode == 1
  assert message in found.stderr
  assert "Traceback" not in found.stderr


def test_the_command_line_explains_itself(capsys):
  with pytest.raises(SystemExit) as stop:
    app.main(["pod", "--help"])
  assert stop.value.code == 0
  assert "decode_float" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("argv", "message"),
  [(["--what", "serve"], "--what serve: it is one of train"), ([], "--config is missing")],
)
def test_missing_and_unknown_flags_are_named(argv, message):
  with pytest.raises(SystemExit, match=message):
    app.main(["pod", *argv])
