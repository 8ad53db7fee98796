"""Some tests train or import megatron-core in this process: it is prepared for the CPU before anything imports it."""

from mswift.parallel import device

device.prepare("cpu")
