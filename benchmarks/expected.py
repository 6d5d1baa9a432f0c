"""Expected time per image on devices that were not measured, calculated: python benchmarks/expected.py

Prints the Markdown table of docs/measurements/devices.md. Time = operations / (published rate × assumed efficiency).
"""

from __future__ import annotations

from dataclasses import dataclass

# Operations per image, counted by `fbclip bench` from the exported graph (in "operations" of its JSON).
OPERATIONS = {"ViT-L/14 at 518 px": 1.36e12}
# Shares of the published rate that whole transformers reach at batch 1: assumptions, low and high.
EFFICIENCY = {"fp32": (0.5, 0.8), "fp16": (0.3, 0.5), "int8": (0.2, 0.4)}


@dataclass(frozen=True)
class Device:
    """Published dense rates in units of 1e12 operations per second.

    Attributes:
        fp16: with float32 accumulation, as a float16 graph is built by default.
        int8: dense; data sheets often print twice that, for sparse weights.
    """

    name: str
    fp32: float
    fp16: float
    int8: float


def orin(name: str, multiprocessors: int, gigahertz: float) -> Device:
    """An Orin's GPU, without its other accelerators: per multiprocessor and clock 256, 2,048 and 4,096 operations."""
    rate = multiprocessors * gigahertz * 1e-3
    return Device(name, 256 * rate, 2048 * rate, 4096 * rate)


DEVICES = (
    orin("Jetson Orin Nano 8 GB (1.02 GHz)", 8, 1.02),
    orin("Jetson Orin NX 16 GB (918 MHz)", 8, 0.918),
    orin("Jetson AGX Orin 64 GB (1.3 GHz)", 16, 1.3),
    Device("T4", 8.1, 65, 130),
    Device("L4", 30.3, 121, 242),
    Device("A10", 31.2, 125, 250),
    Device("RTX 3060", 12.7, 25.5, 102),
    Device("RTX 4060", 15.1, 30.2, 121),
    Device("RTX 4090", 82.6, 165, 661),
)


def milliseconds(operations: float, rate: float, precision: str) -> str:
    low, high = (operations / (rate * 1e12 * share) * 1e3 for share in reversed(EFFICIENCY[precision]))
    return f"{low:,.3g} to {high:,.3g}" if high < 1000 else f"{low:,.0f} to {high:,.0f}"


def main() -> None:
    for model, operations in OPERATIONS.items():
        print(f"**{model}**, {operations / 1e12:g} TFLOP per image, milliseconds:\n")
        print("| device | fp32 rate | fp16 rate | int8 rate | fp32 | fp16 | int8 |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for device in DEVICES:
            rates = {precision: getattr(device, precision) for precision in EFFICIENCY}
            times = [milliseconds(operations, rate, precision) for precision, rate in rates.items()]
            print("|", " | ".join([device.name, *(f"{rate:.3g}" for rate in rates.values()), *times]), "|")


if __name__ == "__main__":
    main()
