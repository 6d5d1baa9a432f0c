"""A page to watch, and predictions over HTTP."""
