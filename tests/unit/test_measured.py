"""What is counted as not finite is what numpy says is not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.converters.measured import EXPONENT_BITS, Measuring, non_finite

FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


@pytest.mark.parametrize("dtype", EXPONENT_BITS)
@given(data=st.data())
def test_infinities_and_nans_are_counted(dtype: str, data: st.DataObject) -> None:
    item_bytes, mask = EXPONENT_BITS[dtype]
    sign = 1 << (8 * item_bytes - 1)
    edges = st.sampled_from([0, sign, mask, sign | mask, mask - 1, sign | (mask - 1), mask | 1, sign | mask | 1])
    bits = data.draw(st.lists(edges | st.integers(0, 2 * sign - 1), max_size=20))
    array = np.array(bits, f"<u{item_bytes}")
    values = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array.view(FLOATS[dtype])
    assert non_finite(dtype, memoryview(array.tobytes())) == np.count_nonzero(~np.isfinite(values))


def test_other_dtypes_have_none_and_blocks_add_up() -> None:
    assert non_finite("I32", memoryview(b"\xff" * 16)) == 0
    whole, parts = Measuring("F32"), Measuring("F32")
    data = memoryview(np.array([1.0, np.inf, -np.inf, np.nan, 0.0], np.float32).tobytes())
    whole(data)
    parts(data[:8])
    parts(data[8:])
    assert whole.result() == parts.result()
    assert whole.result().non_finite == 3
