"""Seconds on one core: the tiny run with gated linear attention (arXiv:2312.06635).

python -m jaxquant.apps.train --config configs/tiny_gla.py --workdir out/tiny_gla
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.steps = 60
  config.batch_size = 4
  config.seq_len = 32
  config.architecture = "gla"
  config.model = {
    "vocab": 256,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "key_dim": 4,
    "value_dim": 8,
    "gate_rank": 8,
    "d_ff": 64,
    "tied": False,
    "scan": True,
    "remat": False,
    "dtype": "float32",
    "max_len": 32,
  }
  config.optimizer = {"learning_rate": 1e-2, "warmup": 5, "weight_decay": 0.1, "clip": 1.0}
  config.recipe = None
  config.log_every = 5
  config.eval_every = 20
  config.eval_batches = 4
  config.checkpoint_every = 10
  config.keep = 3
  return config
