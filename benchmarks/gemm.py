"""GFLOP/s of one core for the fp32 matrix product: torch's own (MKL) against oneDNN, at the shapes of a training step.

OMP_NUM_THREADS=1 python benchmarks/gemm.py
"""

import statistics
import time
from collections.abc import Callable

import torch

from mswift.parallel.megatron.cpu_linear import onednn_product as onednn


def rate(function: Callable[[], object], flops: float, rounds: int = 15) -> float:
    """GFLOP per CPU second, median."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return flops / statistics.median(seconds) / 1e9


def main() -> None:
    """Print one line per shape."""
    torch.set_num_threads(1)
    for n, i, o in ((512, 512, 512), (512, 512, 3072), (512, 512, 8192)):
        x, weight, gradient = torch.randn(n, i), torch.randn(o, i), torch.randn(n, o)
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "forward": (lambda x=x, w=weight: x @ w.t(), lambda x=x, w=weight: onednn(x, w)),
            "input gradient": (lambda g=gradient, w=weight: g @ w, lambda g=gradient, w=weight: onednn(g, w.t())),
            "weight gradient": (lambda g=gradient, x=x: g.t() @ x, lambda g=gradient, x=x: onednn(g.t(), x.t())),
        }
        for name, functions in pairs.items():
            mkl, other = (rate(function, 2.0 * n * i * o) for function in functions)
            print(f"{n} x {i} x {o} {name:16s} torch {mkl:4.0f}  oneDNN {other:4.0f} GFLOP/s  {other / mkl:.2f}x")


if __name__ == "__main__":
    main()
