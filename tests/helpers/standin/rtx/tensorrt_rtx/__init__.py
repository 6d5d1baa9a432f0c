"""Stand-in of `tensorrt_rtx`: the one of `tensorrt`, made from the record of TensorRT-RTX."""

import sys

import tensorrt

sys.modules[__name__] = tensorrt
