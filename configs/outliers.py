"""Outliers over a training run, as CHON watches them (arXiv:2602.02047), with spectra beside.

python -m jaxquant.apps.train --config configs/outliers.py --workdir out/outliers
python -m jaxquant.apps.report --recipes w8a8_int8 --workdir out/outliers

The part behind a colon is a row of docs/systems.md, or f32 (the default): under which recipe the
run trains, and so what its gradients are. Rows of taps come every 20 steps; the report shows them
as maps of time by layer, hot channels and spectra.

Expected: see the rows nvfp4_nearest and int4_embeddings of docs/systems.md.

Time: about 20 s of one core to compile the taps; 200 steps of 0.1 s; 1 s a row.
"""

import ml_collections

from jaxquant.diagnostics import OUTLIERS, SPECTRA
from jaxquant.recipes import RECIPES


def get_config(recipe: str = "f32") -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 200
  config.batch_size = 8
  config.seq_len = 64
  config.model = {
    "vocab": 256,
    "d_model": 64,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "d_ff": 192,
    "max_len": 64,
  }
  config.optimizer = {"learning_rate": 3e-3, "warmup": 20, "weight_decay": 0.1, "clip": 1.0}
  config.recipe = None if recipe == "f32" else RECIPES[recipe].make
  config.watch = {"every": 20, "rules": SPECTRA + OUTLIERS}
  config.log_every = 10
  config.eval_every = 100
  config.eval_batches = 10
  config.checkpoint_every = 100
  config.keep = 1
  return config
