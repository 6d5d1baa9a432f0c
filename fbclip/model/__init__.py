"""CLIP, the network on it, and its checkpoints. Needs torch."""
