"""Low-precision training of a small decoder, by recipe: the figures of docs/results/training.md.

python -m jaxquant.apps.train --config configs/lowprec.py:nvfp4 --workdir out/nvfp4
python -m jaxquant.apps.train --config configs/lowprec.py:chon_gla,gla --workdir out/chon_gla

The part behind the colon is RECIPE or RECIPE,ARCHITECTURE: a row of docs/systems.md (or f32), and
"transformer" (the default) or "gla". The float twin trains beside it on the same batches; the
gap and its 95 % interval are in the progress line and in metrics.jsonl. Sources: those of the row.

A late switch to another recipe, as the NVFP4 paper does (arXiv:2509.25149), is two fields:
  config.switch = {"step": 250, "recipe": mxfp8}

Another optimizer is one field, or two; StableSPAM clips by itself:
  config.optimizer.method = "stable_adamw"
  config.optimizer.method, config.optimizer.clip = "stable_spam", None

Expected: see docs/results/training.md, made by `python -m jaxquant.apps.training_evidence` with the
same model, data and optimizer: 2.0 nats per byte or less in float32, within 3 % of it for every
recipe but mxint4.

Time: 300 steps of 0.1 s of one core for the run and as much for its twin; a minute on 2 idle cores.
"""

import ml_collections

from jaxquant.recipes import RECIPES

MIXERS = {
  "transformer": {"n_kv_heads": 4, "head_dim": 32},
  "gla": {"key_dim": 16, "value_dim": 32, "gate_rank": 16},
}


def get_config(what: str = "nvfp4") -> ml_collections.ConfigDict:
  recipe, _, architecture = what.partition(",")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 300
  config.batch_size = 8
  config.seq_len = 128
  config.accumulate = 1
  config.devices = 1
  config.architecture = architecture or "transformer"
  config.model = {
    "vocab": 256,
    "d_model": 128,
    "n_layers": 2,
    "n_heads": 4,
    "d_ff": 320,
    "max_len": 128,
  } | MIXERS[config.architecture]
  config.optimizer = {"learning_rate": 3e-3, "warmup": 20, "weight_decay": 0.1, "clip": 1.0}
  config.optimizer.method = "adamw"  # of jaxquant.optimizers.METHODS
  config.recipe = None if recipe == "f32" else RECIPES[recipe].make
  config.switch = None
  config.twin = None if recipe == "f32" else {"window": 100}
  config.spike = {"window": 32, "threshold": 6.0, "skip": False}
  config.watch = None
  config.log_every = 10
  config.eval_every = 100
  config.eval_batches = 40
  config.checkpoint_every = 100
  config.keep = 2
  return config
