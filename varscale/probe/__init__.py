"""Measure what a model's layers put out, inside jit."""

from varscale.probe.statistics import LayerStatistics, measure

__all__ = ["LayerStatistics", "measure"]
