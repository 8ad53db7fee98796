"""A weight as the product that an adapter starts from (PiSSA, OLoRA). Shapes: o, i features of a linear, r rank."""

import torch
from torch import Tensor


def factorised(weight: Tensor, rank: int, scale: float, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """A [r, i] and B [o, r] as PEFT starts them from a weight [o, i], fp32.

    pissa: the largest singular values (Meng et al. 2024, arXiv 2404.02948), scale * B @ A being their part of the
    weight; pissa_niter_N: of a randomised decomposition with N iterations, drawn from `seed`. olora: the first columns
    of Q and rows of R (Bueyuekakyuez 2024, arXiv 2406.01775).
    """
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            left, values, right = torch.svd_lowrank(weight, rank, niter=int(init.rpartition("_")[2]))
            right = right.t()
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots
