"""First values of adapters: a pure function of (seed, parameter name), whatever the layout, device, library."""

import hashlib

import numpy as np
import numpy.typing as npt

_WORDS = 4  # of a block of Philox, by which its counter goes on


def kaiming_uniform(seed: int, name: str, rows: int, columns: int, first_row: int = 0) -> npt.NDArray[np.float32]:
    """Uniform in +-1/sqrt(columns), [rows, columns]: PEFT's bound for lora_A (kaiming_uniform_ with a = sqrt(5)).

    Element i is made of the i-th raw word of a Philox generator whose key is a hash of seed and name: NumPy keeps
    raw streams stable over versions, its distributions not. `first_row`: of the rows of a taller matrix, which are
    drawn without those before.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator, (blocks, skipped) = np.random.Philox(key=key), divmod(first_row * columns, _WORDS)
    generator.advance(blocks)
    words = generator.random_raw(skipped + rows * columns)[skipped:]
    unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)  # [0, 1): 24 bits, exact in float32
    bound = np.float32(1.0 / np.sqrt(columns))
    values: npt.NDArray[np.float32] = ((unit * np.float32(2) - np.float32(1)) * bound).reshape(rows, columns)
    return values
