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
  "repeatable", derandomize=True, max_examples=20, deadline=None, database=None
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def golden():
  """Bit-exact vectors made by independent tools: {section: records}; `meta` says which tools."""
  return json.loads((GOLDEN / "formats.json").read_text())
