"""Time and memory of post-training quantization of a 4-layer decoder, any recipe.

python benchmarks/ptq_speed.py --write
python benchmarks/ptq_speed.py --recipes w4a16_gptq,quantease --weights donated

Each recipe runs in processes of its own: once to compile, then again, which is what is timed. The
float weights are kept, or given away (`donate=True`). What is needed at the peak is found in a
further process that gives freed arrays back at once, which takes time of its own.
Linux only: the peak of the resident memory is reset between runs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import time

import common
import jax

from jaxquant.formats import NVFP4
from jaxquant.models.transformer import Transformer, TransformerShape
from jaxquant.ops.qdot import FLOAT, weight_only
from jaxquant.ops.tracked import Static
from jaxquant.ptq import quantize_params, size_bytes
from jaxquant.recipe import Recipe
from jaxquant.recipes import by_name
from jaxquant.recipes.weight_act import smoothquant
from jaxquant.recipes.weight_only import w4a16_gptq, w4a16_rtn
from jaxquant.solvers.clip_search import clip_search
from jaxquant.solvers.gptq import gptq
from jaxquant.statistics import block_hessian
from jaxquant.transform_gates import w4a4

SHAPE = TransformerShape(
  vocab=256, d_model=1024, n_layers=4, n_heads=16, n_kv_heads=16, head_dim=64, d_ff=2816
)
BATCHES, LENGTH = 8, 256  # 2048 calibration tokens
OWN = {  # cases that are no row of the table of recipes
  "rtn_nvfp4": lambda: w4a16_rtn(NVFP4),
  "nvfp4_calibrated": lambda: w4a4(Static()),  # nearest, input scales from calibration
  "nvfp4_clipped": lambda: Recipe(  # nearest, weight ranges by the error of the calibration outputs
    (("embed|head", FLOAT), (".*", weight_only(NVFP4))), clip_search, block_hessian(NVFP4.block)
  ),
  "gptq_nvfp4": lambda: w4a16_gptq(NVFP4),
  "smoothquant_gptq": lambda: smoothquant(solve=gptq),
}
GOALS = {  # seconds a layer
  "w4a16_gptq": 1.5,
  "nvfp4_calibrated": 0.5,
  "awq": 3.0,
  "smoothquant_gptq": 2.0,
}
WEIGHTS = ("kept", "donated")
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"  # glibc's
RETURNED = 2**20  # bytes; larger arrays go back to the system when they are freed
MEMORY_GOAL = 1.3  # times the float model
DEFAULT = "rtn_nvfp4,w4a16_rtn,w4a16_gptq,awq,nvfp4_calibrated,nvfp4_clipped,gptq_nvfp4"
DEFAULT += ",smoothquant_gptq"


def recipe_of(name: str) -> Recipe:
  return OWN[name]() if name in OWN else by_name(name)


def resident(field: str) -> int:
  """Bytes of VmRSS, resident now, or VmHWM, the most since `forget_peak`."""
  with open("/proc/self/status") as status:
    line = next(line for line in status if line.startswith(field))
  return int(line.split()[1]) * 1024


def forget_peak() -> int:
  """Starts a new peak, where memory is measured without malloc's heaps; bytes resident now."""
  gc.collect()
  if THRESHOLD in os.environ:
    ctypes.CDLL(None).malloc_trim(0)
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
  return resident("VmRSS")


def matmul_rate() -> float:
  """GFLOP/s of a float32 product of 2048 x 2048, the best of five: what the machine gives today."""
  a = jax.random.normal(jax.random.key(0), (2048, 2048))
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(a))
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(product(a))
    seconds.append(time.perf_counter() - start)
  return 2 * 2048**3 / min(seconds) / 1e9


def measure(name: str, rounds: int, donate: bool) -> dict:
  """Seconds and peak memory of one recipe in this process."""
  model = Transformer(SHAPE)
  tokens = jax.random.randint(jax.random.key(0), (BATCHES, LENGTH), 0, SHAPE.vocab)
  batches = [tokens[i : i + 1] for i in range(BATCHES)]
  init = jax.jit(model.init)
  variables = jax.block_until_ready(init(jax.random.key(1), batches[0]))
  jax.block_until_ready(jax.jit(model.apply)(variables, batches[0]))
  held = size_bytes(variables)
  wall, cpu, memory = [], [], []
  for _ in range(rounds + 1):
    if donate and memory:  # the last run has consumed them
      variables = jax.block_until_ready(init(jax.random.key(1), batches[0]))
    before = forget_peak()
    start, busy = time.perf_counter(), time.process_time()
    how = {"progress": False, "donate": donate}
    packed = quantize_params(model, variables, recipe_of(name), batches, **how)
    jax.block_until_ready(packed)
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - busy)
    memory.append((resident("VmHWM") - before + held) / held)
    share = size_bytes(packed) / held
    del packed
  return {
    "first": wall[0],
    "wall": min(wall[1:]),
    "cpu": min(cpu[1:]),
    "memory": max(memory[1:]),
    "first_memory": memory[0],
    "packed": share,
    "matmul": matmul_rate(),
    "load": os.getloadavg()[0],
  }


def measured(name: str, rounds: int, weights: str, env: dict[str, str]) -> dict:
  """`measure` in a process of its own."""
  command = [sys.executable, __file__, "--one", name, "--rounds", str(rounds)]
  command += ["--weights", weights]
  out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout
  return json.loads(out.splitlines()[-1])


def row(name: str, weights: str, found: dict, returned: dict) -> list[str]:
  """One line: times as users have them, and the peak of what is needed."""
  layers = SHAPE.n_layers
  wall, cpu = found["wall"] / layers, found["cpu"] / layers / os.cpu_count()
  word = {True: "met", False: "missed"}
  goal = f"<= {GOALS[name]} s: {word[wall <= GOALS[name]]}" if name in GOALS else ""
  memory = f"{returned['memory']:.2f} ({word[returned['memory'] <= MEMORY_GOAL]})"
  peaks = [memory, f"{found['packed']:.2f}"]
  times = [f"{wall:.2f}", goal, f"{cpu:.2f}", f"{found['first']:.1f}"]
  return [name, weights, *times, f"{found['matmul']:.0f}", *peaks, f"{found['load']:.1f}"]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--recipes", default=DEFAULT, help="rows of the table of recipes, or own")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--write", action="store_true", help="write docs/results/ptq_speed.md")
  parser.add_argument("--weights", choices=("both", *WEIGHTS), default="both")
  parser.add_argument("--one", help=argparse.SUPPRESS)  # the child's part
  args = parser.parse_args()
  if args.one:
    print(json.dumps(measure(args.one, args.rounds, args.weights == "donated")))
    return
  # Else glibc keeps freed arrays of up to 32 MB, in a heap for each thread.
  returning = os.environ | {THRESHOLD: str(RETURNED)}
  rows = []
  weights = WEIGHTS if args.weights == "both" else (args.weights,)
  for name, how in itertools.product(args.recipes.split(","), weights):
    found = measured(name, args.rounds, how, dict(os.environ))
    rows.append(row(name, how, found, measured(name, 1, how, returning)))
    print(" | ".join(rows[-1]), file=sys.stderr)
  header = ["recipe", "float weights", "s a layer", "goal", "CPU s a layer / cores", "first run s"]
  header += ["matmul GFLOP/s", "peak memory", "packed", "load"]
  table = common.markdown(header, rows)
  print(table)
  if args.write:
    s = SHAPE
    body = (
      f"Decoder of {s.n_layers} layers, width {s.d_model}, feed-forward {s.d_ff}, "
      f"{BATCHES * LENGTH} calibration tokens, float32, calibration included. Wall and CPU time "
      f"are the least of {args.rounds} runs of `quantize_params` after one that compiles; the "
      "first run includes that. CPU time of all threads over the number of cores is what the wall "
      "time would be on idle, evenly used cores. The float weights are kept by the caller or given "
      "away (`donate=True`). Memory is in units of the float model: 1 + what the process has "
      "resident at its peak above what it had just before, the packed model included; goal <= "
      f"{MEMORY_GOAL}. Peak memory is that of a further process in which freed arrays above "
      f"{RETURNED >> 20} MB go back to the system at once ({THRESHOLD}={RETURNED}), "
      "which takes GPTQ 30 % more time; without, glibc keeps them in heaps. The rate of a product "
      "of 2048 x 2048 right after the timed runs says how fast the machine was then: shared hosts "
      "change. Load is that of the "
      "machine at the end of the timed runs, this one included."
      "\n\n"
      f"{table}"
    )
    common.write("ptq_speed", "Time to quantize a model after training", body)


if __name__ == "__main__":
  main()
