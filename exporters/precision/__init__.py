"""Graphs of lower precision: typed, their rounding twins, and what overflows."""
