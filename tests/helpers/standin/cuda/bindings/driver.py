"""The few functions of `cuda.bindings.driver` that capture and replay a stream.

Names, arguments and results as in cuda-bindings 13.5: every function returns a tuple that starts with a CUresult.
"""

import os
from enum import IntEnum

import gpu_model


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_ILLEGAL_STATE = 401
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUstream:
    def __init__(self, init_value=0):
        self._stream = gpu_model.current()._streams[init_value]


class CUgraph:
    def __init__(self, nodes):
        self._nodes = nodes


class CUgraphExec:
    def __init__(self, nodes):
        self._nodes = nodes


def cuStreamBeginCapture(hStream, mode):
    mode = CUstreamCaptureMode(mode)
    if os.environ.get("STANDIN_NO_CAPTURE"):
        return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
    if hStream._stream._capture is not None:
        return (CUresult.CUDA_ERROR_ILLEGAL_STATE,)
    hStream._stream._capture = []
    return (CUresult.CUDA_SUCCESS,)


def cuStreamEndCapture(hStream):
    nodes, hStream._stream._capture = hStream._stream._capture, None
    if nodes is None:
        return CUresult.CUDA_ERROR_ILLEGAL_STATE, None
    return CUresult.CUDA_SUCCESS, CUgraph(nodes)


def cuGraphInstantiate(hGraph, flags):
    if flags != 0 or not hGraph._nodes:
        return CUresult.CUDA_ERROR_INVALID_VALUE, None
    executable = CUgraphExec(hGraph._nodes)
    gpu_model.current()._graphs.add(executable)
    return CUresult.CUDA_SUCCESS, executable


def cuGraphDestroy(hGraph):
    del hGraph._nodes
    return (CUresult.CUDA_SUCCESS,)


def cuGraphLaunch(hGraphExec, hStream):
    if hGraphExec not in gpu_model.current()._graphs:
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)
    for work, uses in hGraphExec._nodes:
        hStream._stream._put(work, *uses)
    return (CUresult.CUDA_SUCCESS,)


def cuGraphExecDestroy(hGraphExec):
    graphs = gpu_model.top()._graphs
    if hGraphExec not in graphs:
        return (CUresult.CUDA_ERROR_INVALID_VALUE,)
    graphs.remove(hGraphExec)
    return (CUresult.CUDA_SUCCESS,)
