"""Metrics over data sets, and their reports."""
