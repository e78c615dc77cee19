"""What a model looks like from outside: taps beside training, plots and the HTML report."""

from jaxquant.diagnostics.html import Plot, Sample, Section, Table, page
from jaxquant.diagnostics.taps import GATES, OUTLIERS, SPECTRA, Rules, taps
from jaxquant.diagnostics.watch import History, Row, Watch

__all__ = [
  "GATES",
  "OUTLIERS",
  "SPECTRA",
  "History",
  "Plot",
  "Row",
  "Rules",
  "Sample",
  "Section",
  "Table",
  "Watch",
  "page",
  "taps",
]
