"""Graphs in low precision from images: data, ranges, Q/DQ graphs, judging, the report."""
