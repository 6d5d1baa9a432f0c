"""Graphs of lower precision."""
