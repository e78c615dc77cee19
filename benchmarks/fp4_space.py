"""Which options of FP4 training pay on a small regression, and what they cost.

python benchmarks/fp4_space.py --seeds 6 --steps 400 --write
"""

from __future__ import annotations

import argparse

import common
import numpy as np

from jaxquant import design_space
from jaxquant.ops.qdot import FLOAT

SCALES = (2.0**-8, 1.0, 2.0**8)
SIZE = 4096  # of the GEMMs whose overhead is listed
BOTH = {"rounding": "sr", "rotation": "rht"}
AID = "optimizer"
TRIED = (
  [{"scale": name} for name in design_space.AXES["scale"]]
  + [{"scale": name, **BOTH} for name in ("e8m0", "e8m0+ts", "e4m3+ts", "ue5m3")]
  + [{"scale": "e4m3+ts", "rounding": name} for name in ("sr", "sr all")]
  + [{"scale": "e4m3+ts", "rotation": name} for name in ("rht w", "rht")]
  + [{"scale": "e4m3+ts", "rotation": "rht w", "rounding": "sr"}]
  + [{"scale": "e4m3+ts", "block": "16"}, {"scale": "e4m3+ts", "maximum": "soft"}]
  + [{"scale": "e4m3+ts", "gradient": name} for name in list(design_space.AXES["gradient"])[1:]]
  # a training aid, no part of the recipe
  + [{"scale": "e4m3+ts", **BOTH, AID: name} for name in list(design_space.OPTIMIZERS)[1:]]
  + [{"scale": name, AID: "stable spam"} for name in ("e8m0", "e4m3+ts")]
)


def row(labels: dict[str, str], naive: np.ndarray, task: design_space.Regression) -> list[str]:
  rule = design_space.choose(**{k: v for k, v in labels.items() if k != AID}).rule("layer")
  optimizer = design_space.OPTIMIZERS[labels.get(AID, "adam")]
  losses = design_space.train(rule, task, loss_scales=SCALES, optimizer=optimizer)
  found = np.asarray(losses, np.float64)
  difference = found[1] - naive
  error = difference.std(ddof=1) / len(naive) ** 0.5
  cost = design_space.overhead(rule, SIZE, SIZE, SIZE)
  extra = cost - design_space.overhead(design_space.choose().rule("layer"), SIZE, SIZE, SIZE)
  value = design_space.gain(naive.mean(), found[1].mean(), extra)
  versus = f"{difference.mean():+.4f} ± {error:.4f}"
  losses = [f"{loss:.4f}" for loss in found.mean(1)]
  saved = design_space.saved_by(rule, SIZE, SIZE, SIZE) / 2**20
  costs = [f"{1e3 * cost:.2f}", f"{saved:.0f}", f"{100 * value:+.1f}"]
  return [" ".join(labels.values()), *losses, versus, *costs]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seeds", type=int, default=6)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--start", type=int, default=0, help="the first row that is measured")
  parser.add_argument("--write", action="store_true", help="write docs/results/fp4_space.md")
  args = parser.parse_args()
  task = design_space.regression(args.seeds, args.steps)
  plain = {
    name: float(design_space.train(FLOAT, task, optimizer=optimizer).mean())
    for name, optimizer in design_space.OPTIMIZERS.items()
  }
  naive = design_space.train(design_space.choose().rule("layer"), task)
  naive = np.asarray(naive, np.float64)[0]
  header = ["options", "loss, scaled 2^-8", "1", "2^8", "less naive", "overhead 1e-3", "saved MiB"]
  header.append("gain %")
  rows = []
  for labels in TRIED[args.start :]:
    rows.append(row(labels, naive, task))
    print(" | ".join(rows[-1]), flush=True)
  if args.write:
    ends = ", ".join(f"{loss:.4f} ({name})" for name, loss in plain.items())
    body = (
      f"Two layers of 32, {args.steps} steps of Adam, {args.seeds} teachers; the float32 student "
      f"ends at {ends}. Losses are of the last tenth of the steps, with the loss multiplied "
      "by three scales. Less naive: against naive MXFP4 (the first row), paired by teacher, mean "
      "and standard error. Overhead: operations of quantization over those of three GEMMs of "
      f"{SIZE} (`design_space.overhead`, proposed constants). Saved: what such a site keeps for "
      "its backward pass beside its weight (`design_space.saved_by`). The last rows have another "
      "optimizer than Adam, at the same rate. Gain: relative loss against naive less the extra "
      f"overhead.\n\n{common.markdown(header, rows)}"
    )
    common.write("fp4_space", "Options of FP4 training on a regression", body)


if __name__ == "__main__":
  main()
