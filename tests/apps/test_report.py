"""The HTML report: one file, nothing loaded, all of its parts."""

import re

import numpy as np
import pytest

from jaxquant.apps import report
from jaxquant.diagnostics import History, Row, Section, Table, page, plots

LOADS = r"""<(script|link|iframe|img|object|embed)\b|@import|url\((?!\#)|\s(src|href)=["'](?!\#)"""


@pytest.fixture(scope="module")
def html(tiny, tmp_path_factory):
  folder = tmp_path_factory.mktemp("report")
  (folder / "metrics.jsonl").write_text(
    "".join(f'{{"step": {i}, "loss": {9 - i / 10}, "validation_loss": 5}}\n' for i in range(1, 50))
  )
  watched = {"layers/mlp/down/x": {"kurtosis": np.ones(2, np.float32)}}
  History(folder, start=0).append(Row(10, watched))
  argv = ("--model", tiny, "--batches", "1", "--calibration_batches", "1", "--new_tokens", "5")
  where = ("--workdir", str(folder), "--out", str(folder / "a" / "report.html"), "--prompt", "x<y>")
  report.main(["report", *argv, *where, "--recipes", "w4a16_gptq"])
  return (folder / "a" / "report.html").read_text()


def test_it_needs_nothing_else(html):
  assert not re.findall(LOADS, html)
  addresses = set(re.findall(r"https?://[^\"\s<]+", html))
  assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # namespaces


def test_it_holds_all_parts(html):
  assert html.count("<svg") == 4
  for text in (
    "bits per weight",
    "relative error of the weight",
    "loss, nats per token",
    "excess kurtosis",
  ):
    assert text in html
  for title in ("Recipes", "Sites", "Samples", "Training", "Outliers", "Provenance"):
    assert f"<h2>{title}</h2>" in html
  assert "layers/mlp/down" in html
  assert "w4a16_gptq: solver gptq" in html
  assert "python -m jaxquant.apps.report --model" in html


def test_text_is_escaped_and_numbers_are_right_aligned(html):
  assert "x&lt;y&gt;" in html
  assert "<y>" not in html
  assert re.search(r'<td class="text">w4a16_gptq</td>\s*<td class="text">W3</td>\s*<td>\d', html)


def test_equal_data_give_equal_plots():
  points = [("a", 4.0, 0.1, 0.01), ("b", 8.0, 0.01, 0.02)]
  first, again = (plots.to_svg(plots.kl_against_bits(points)) for _ in range(2))
  assert first == again
  assert first.startswith("<svg")


def test_plots_of_edge_cases():
  one = plots.kl_against_bits([("a", 4.0, 0.1, float("nan"))])
  close = plots.kl_against_bits([("aaaa", 4.0, 0.1, 0.2), ("bbbb", 4.01, 0.1, 0.01)])
  short = plots.loss_curves({"x": [(1, 2.0)]})
  sites = plots.site_errors({}, "error")
  assert all("<svg" in plots.to_svg(figure) for figure in (one, close, short, sites))


def test_tables_print_and_render_alike():
  table = Table(("name", "n"), [("a", "1"), ("bcd", "20")], note="note")
  assert str(table) == "name   n\n----  --\na      1\nbcd   20\nnote"
  html = page("t", "lead", [Section("s", [table, "a paragraph"])], {"k": "v"})
  assert "<p>a paragraph</p>" in html
  assert '<p class="note">note</p>' in html
