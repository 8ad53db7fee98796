"""Where every rank sits: the degrees of parallelism and the arithmetic between ranks and coordinates. No torch.

*axis* is a mesh axis. Axes, from the fastest-varying rank digit to the slowest (megatron-core's order
tp-cp-dp-pp): **tp** shares each layer's matrices, **cp** shares each sequence, **dp** shares the batch,
**pp** shares the depth. Experts are laid over the same ranks: etp, ep, edp inside one pipeline stage.
"""
