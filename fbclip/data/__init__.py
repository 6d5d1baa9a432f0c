"""Data sets and procedural defects."""
