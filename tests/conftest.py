"""What every test relies on: a CPU that looks like four devices, and the golden vectors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's threads spin while they wait: two of them beside other work take 29 s of CPU for six
# SVDs of 256 x 768 instead of 0.1. Read when scipy is loaded, so before jax.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import json
import pathlib

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
