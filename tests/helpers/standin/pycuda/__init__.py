"""Stand-in of PyCUDA; see gpu_model."""
