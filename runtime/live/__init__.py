"""From frames to verdicts to sinks."""
