"""Stand-in of cuda-bindings; see gpu_model."""

import os

if os.environ.get("STANDIN_NO_CUDA_BINDINGS"):
    raise ModuleNotFoundError("No module named 'cuda.bindings'", name="cuda.bindings")
