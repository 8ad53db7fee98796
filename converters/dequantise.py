"""Which tensors a quantised checkpoint stands for, and by which rule each of them is made."""

from collections import Counter
from collections.abc import Mapping

from mswift.converters.decode import Decoding, HasShape, cast
from mswift.converters.plan import WEIGHT_DTYPES
from mswift.converters.quantization import GroupedCodes, Quantization
from mswift.errors import CheckpointError

_SCALES = ("F32", "BF16")
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def dequantised(
    stored: Mapping[str, HasShape], how: Quantization | GroupedCodes, dtype: str | None = None
) -> dict[str, Decoding]:
    """The decodings of the quantised tensors, by HF name; CheckpointError for parts that do not fit.

    dtype: of the results; None: BF16, or with grouped codes that of most matrices which are not quantised.
    """
    if isinstance(how, GroupedCodes):
        bases = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
        one = dtype or _plain_dtype(stored)
        found = [_grouped(base, stored, how, one) for base in bases]
        found += [bias for base, weight in zip(bases, found, strict=True) for bias in _bias(base, stored, weight.dtype)]
    elif how.method == "fp8":
        found = [_fp8(name, stored, how.block, dtype or "BF16") for name in stored if stored[name].dtype == "F8_E4M3"]
    else:
        found = [_mxfp4(name, stored, dtype or "BF16") for name in stored if name.endswith("_blocks")]
    return {decoding.name: decoding for decoding in found}


def _fp8(name: str, stored: Mapping[str, HasShape], block: tuple[int, int], dtype: str) -> Decoding:
    shape, scale = stored[name].shape, stored.get(name + "_scale_inv")
    if scale is None or len(shape) != 2:
        raise CheckpointError(f"{name}: is F8_E4M3 {list(shape)} without a {name}_scale_inv for its blocks")
    expected = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
    if scale.shape != expected or scale.dtype not in _SCALES:
        raise CheckpointError(
            f"{name}_scale_inv: is {scale.dtype} {list(scale.shape)}; {list(shape)} in blocks of {list(block)} "
            f"needs F32 {list(expected)}"
        )
    rule = f"F8_E4M3 times {scale.dtype} scale of each {block[0]}x{block[1]} block, rounded to {dtype}"
    decoder = ("decoders.Fp8Blocks", (name, shape[1], block, scale.dtype))
    return Decoding(name, dtype, shape, (name, name + "_scale_inv"), rule, decoder)


def _mxfp4(blocks_name: str, stored: Mapping[str, HasShape], dtype: str) -> Decoding:
    name, blocks = blocks_name.removesuffix("_blocks"), stored[blocks_name]
    scales = stored.get(name + "_scales")
    fits = blocks.dtype == "U8" and len(blocks.shape) == 4 and blocks.shape[3] == 16
    if not fits or scales is None or (scales.dtype, scales.shape) != ("U8", blocks.shape[:3]):
        theirs = "absent" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise CheckpointError(
            f"{blocks_name}: is {blocks.dtype} {list(blocks.shape)}, its {name}_scales {theirs}; MXFP4 has U8 "
            "[experts, rows, groups, 16] and U8 [experts, rows, groups]"
        )
    experts, rows, groups, _ = blocks.shape
    rule = f"MXFP4 (e2m1 times the e8m0 scale of each 32), transposed, rounded to {dtype}"
    shape, inputs = (experts, 32 * groups, rows), (blocks_name, name + "_scales")
    return Decoding(name, dtype, shape, inputs, rule, ("decoders.Mxfp4", (name, rows, groups)))


def _plain_dtype(stored: Mapping[str, HasShape]) -> str | None:
    """That of most matrices which are not quantised (scales may have another); None where there are none."""
    matrices = (t.dtype for name, t in stored.items() if len(t.shape) > 1 and not name.endswith(_PARTS))
    counts = Counter(dtype for dtype in matrices if dtype in WEIGHT_DTYPES)
    return max(counts, key=counts.__getitem__, default=None)


def _grouped(base: str, stored: Mapping[str, HasShape], how: GroupedCodes, dtype: str | None) -> Decoding:
    """[o, i] from qweight, qzeros, scales (and GPTQ's g_idx), which are stored with their inputs first."""
    weight, per_word = stored[base + ".qweight"], 32 // how.bits
    if weight.dtype != "I32" or len(weight.shape) != 2:
        raise CheckpointError(f"{base}.qweight: is {weight.dtype} {list(weight.shape)}; I32 [rows, columns] is needed")
    rows, columns = weight.shape
    inputs, outputs = (rows * per_word, columns) if how.method == "gptq" else (rows, columns * per_word)
    size = inputs if how.group == -1 else how.group
    groups = -(-inputs // size)
    if outputs % per_word or (how.method == "awq" and inputs % size):
        whole = f", and groups of {size} inputs are whole" if how.method == "awq" else ""
        raise CheckpointError(
            f"{base}.qweight: {list(weight.shape)} of {how.bits} bits means {inputs} inputs and {outputs} outputs; a "
            f"word of qzeros has {per_word} outputs{whole}"
        )
    _expect(base + ".qzeros", stored, ("I32",), (groups, outputs // per_word))
    _expect(base + ".scales", stored, WEIGHT_DTYPES, (groups, outputs))
    names = [base + part for part in _PARTS[:3]]
    if how.method == "gptq" and base + ".g_idx" in stored:
        _expect(base + ".g_idx", stored, ("I32",), (inputs,))
        names.append(base + ".g_idx")
    elif how.act_order:
        raise CheckpointError(f"{base}.qweight: desc_act is true, but {base}.g_idx, the group of each input, is absent")
    scale_dtype = stored[base + ".scales"].dtype
    dtype = dtype or scale_dtype
    ordered = len(names) == 4
    rule = (
        f"{how.method.upper()} ({how.bits} bits less the zero, times the {scale_dtype} scale, of "
        f"{'the group in g_idx' if ordered else f'each {size} inputs'}), transposed, rounded to {dtype}"
    )
    arguments: tuple[object, ...] = (base, (inputs, outputs, groups, size), scale_dtype)
    if how.method == "gptq":
        arguments = (*arguments, how.bits, how.zero_plus, how.zero_wraps, ordered)
    decoder = (f"group_decoders.{how.method.capitalize()}", arguments)
    return Decoding(base + ".weight", dtype, (outputs, inputs), tuple(names), rule, decoder, scale_dtype)


def _bias(base: str, stored: Mapping[str, HasShape], dtype: str) -> list[Decoding]:
    """That of a quantised linear, where it has another dtype than the weights: GPTQModel writes F16 beside BF16."""
    name = base + ".bias"
    bias = stored.get(name)
    return [] if bias is None or bias.dtype == dtype else [cast(name, bias, dtype)]


def _expect(name: str, stored: Mapping[str, HasShape], dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    tensor = stored.get(name)
    if tensor is None or tensor.dtype not in dtypes or tensor.shape != shape:
        found = "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise CheckpointError(f"{name}: is {found}; {' or '.join(dtypes)} {list(shape)} is needed beside the qweight")
