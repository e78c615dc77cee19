"""The notebooks run from top to bottom, on a tiny model instead of the shipped one."""

import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
# Takes the place of the cell tagged "parameters": nothing in a notebook looks at its environment.
SMALL = """
from jaxquant.models import Transformer, TransformerShape
model = Transformer(TransformerShape(
  d_model=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128, max_len=32))
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
BATCHES, NEW_TOKENS = 1, 8
"""


FEW_STEPS = """
STEPS, EVERY, BATCH, LENGTH = 4, 2, 2, 32
WATCHED = (*SPECTRA[:1], *GATES, (".*mlp/(up|down)/[xwg]", OUTLIERS[0][1]))
common = {"d_model": 64, "n_layers": 2, "n_heads": 2, "d_ff": 128, "max_len": LENGTH}
models = {
  "softmax": Transformer(TransformerShape(n_kv_heads=2, head_dim=32, **common)),
  "gla": GLA(GLAShape(key_dim=16, value_dim=32, **common)),
}
COMPARED = ["softmax"]
"""


def executed(name, small=SMALL):
  notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
  parameters = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
  assert len(parameters) == 1
  parameters[0].source = small
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
  manager = client.create_kernel_manager()
  manager.kernel_spec.argv[0] = sys.executable  # this very environment, whatever is registered
  return client.execute()


def printed(notebook):
  outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
  return "".join(o.get("text", "") for o in outputs), outputs


def test_tour():
  text, outputs = printed(executed("00_tour.ipynb"))
  assert "nvfp4       e2m1     16 x 1   (e4m3_tensor)           4.500" in text
  assert "train/serve difference: 0.0" in text
  assert "layers/mlp/down" in text
  kinds = [kind for o in outputs for kind in o.get("data", {})]
  assert "image/svg+xml" in kinds
  assert kinds.count("text/html") >= 2  # a QTensor and a recipe by treescope


def test_new_paper():
  text, outputs = printed(executed("02_new_paper.ipynb"))
  assert "no step raised it: True" in text
  assert "train/serve difference, nearest: 0.0" in text
  # A recipe that fails becomes a row without figures.
  bits = dict(re.findall(r"^(rtn|gptq|quantease 2 bits|alternate)  .*? (\d\.\d{3}) ", text, re.M))
  assert len(bits) == 4
  assert len(set(bits.values())) == 1  # what it is compared with costs the same
  assert "image/svg+xml" in [kind for o in outputs for kind in o.get("data", {})]


def test_outliers():
  text, outputs = printed(executed("03_outliers.ipynb", FEW_STEPS))
  found = {
    n: float(e) for n, e in re.findall(r"^(no patch|K \+ 2?k, k = +\d+) +(\d\.\d+)", text, re.M)
  }
  assert abs(found["K + k, k = 32"] / found["no patch"] - 1) < 0.01  # repairs nothing
  errors = [found[f"K + 2k, k = {k:3}"] for k in (16, 32, 64)]
  assert errors == sorted(errors, reverse=True)
  assert errors[1] < 0.75 * found["no patch"]
  assert "softmax  2 rows" in text
  assert "gla      2 rows" in text
  assert len(re.findall(r"gap [+-]0\.\d+ \+- \d", text)) == 2
  kinds = [kind for o in outputs for kind in o.get("data", {})]
  assert kinds.count("image/svg+xml") == 6


def test_a_system_takes_less_than_40_lines():
  notebook = nbformat.read(NOTEBOOKS / "02_new_paper.ipynb", as_version=4)
  (cell,) = [c for c in notebook.cells if "system" in c.metadata.get("tags", ())]
  assert len(cell.source.splitlines()) < 40


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.name)
def test_what_is_committed_is_small_and_was_not_run(path):
  notebook = nbformat.read(path, as_version=4)
  assert path.stat().st_size < 200_000
  assert all(
    not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code"
  )
