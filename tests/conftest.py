"""What every test relies on: a CPU that looks like four devices, and the golden vectors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's threads spin while they wait: two of them beside other work take 29 s of CPU for six
# SVDs of 256 x 768 instead of 0.1. Read when scipy is loaded, so before jax.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Two thirds of the time of these tests is compilation. LLVM's first level compiles a quarter faster
# and still contracts a * b + c, which is what tells apart programs that should have the same bits
# (level 0 does not); and what one process has compiled, others load: workers, commands, notebooks.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=1 "
  + os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=4"
)

import atexit
import collections
import gc
import json
import pathlib
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else it is the parent's, or somebody's choice
  COMPILED = tempfile.mkdtemp(prefix="jaxquant-tests-")
  atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"

hypothesis.settings.register_profile(
  "repeatable", derandomize=True, max_examples=12, deadline=None, database=None
)
hypothesis.settings.load_profile("repeatable")


gc.set_threshold(50_000, 20, 20)  # tracing makes objects by the million, and hardly any cycles


def pytest_addoption(parser):
  parser.addoption("--all-rows", action="store_true", help="also what `sampled` leaves out")


def pytest_configure(config):
  config.addinivalue_line(
    "markers", "sampled(n): one in n of its rows runs, all of them with --all-rows (make test-all)"
  )


def pytest_collection_modifyitems(config, items):
  """Expensive checks of long tables see every n-th row, along the diagonal of a product of two."""
  if config.getoption("--all-rows"):
    return
  seen, kept, left = collections.Counter(), [], []
  for item in items:
    mark, test = item.get_closest_marker("sampled"), item.nodeid.split("[")[0]
    i, n = seen[test], mark.args[0] if mark else 1
    seen[test] += 1
    (kept if i % n == i // n % n else left).append(item)
  config.hook.pytest_deselected(items=left)
  items[:] = kept


@pytest.fixture(scope="session")
def golden():
  """Bit-exact vectors made by independent tools: {section: records}; `meta` says which tools."""
  return json.loads((GOLDEN / "formats.json").read_text())
