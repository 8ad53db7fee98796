"""Weights that are stored under their Hugging Face names: in Hugging Face files, or in a plain DCP checkpoint."""

from collections.abc import Collection, Mapping
from pathlib import Path

from mswift.converters.decode import HasShape
from mswift.converters.dequantise import dequantised
from mswift.converters.io.megatron_lm import strip_prefix
from mswift.converters.io.safetensors import SAFETENSORS
from mswift.converters.io.stored import StoredTensor
from mswift.converters.io.torch_bin import TORCH_BIN
from mswift.converters.io.torch_dist_reader import TorchDistSource
from mswift.converters.layout import Region, identity
from mswift.converters.plan import DTYPE_BYTES, table_for
from mswift.converters.quantization import FIELD, quantization_of
from mswift.converters.source import Place, Source, SourceOptions, check_shapes, chunk_places
from mswift.errors import CheckpointError

HF_FOLDER = "hf"
TRAINING_STATE = "state of training (optimizer, random numbers); weights only are converted"
HEAD = "lm_head.weight"
_DEFAULTS = SourceOptions()


class NamedSource(Source):
    """Tensors stored under their HF names, some of them perhaps quantised."""

    def _adopt(self, stored: Mapping[str, HasShape]) -> None:
        """Takes the stored tensors in: dequantises, drops, checks."""
        quantization = quantization_of(self.config)
        if quantization is not None:
            made = dequantised(stored, quantization, self.options.dtype)
            if not made:
                raise CheckpointError(
                    f"{self.path}: config.json has a {FIELD} ({quantization.method}), but no tensor is quantised; "
                    "remove the field"
                )
            self._decodings |= made
        inputs = {name for decoding in self._decodings.values() for name in decoding.inputs}
        logical: dict[str, HasShape] = {name: t for name, t in stored.items() if name not in inputs}
        for name, decoding in self._decodings.items():
            if name in logical:
                raise CheckpointError(f"{self.path}: holds {name} and the quantised {', '.join(decoding.inputs)}")
            logical[name] = decoding
        self._stored, self._logical = stored, logical
        self.table = table_for(self.config, logical)
        drops = {name: self.table.dropped[name] for name in logical if name in self.table.dropped}
        self.dropped = {name: drop.reason for name, drop in drops.items()}
        self.dropped |= self._biases_of_nothing(logical)
        self.repeats = {name: self._original(drop.same_as) for name, drop in drops.items() if drop.same_as}
        kept = {name: tensor for name, tensor in logical.items() if name not in self.dropped}
        check_shapes(str(self.path), {n: t.shape for n, t in kept.items()}, self.table.hf)
        self._cast_all(self.table.has_own_dtype)
        self.dtype = self._one_dtype(self.table.has_own_dtype)

    def _biases_of_nothing(self, logical: Mapping[str, HasShape]) -> dict[str, str]:
        """Biases of zeros that AutoGPTQ gives linears which have none in the model; CheckpointError for others."""
        found = {}
        for name, tensor in logical.items():
            base, _, kind = name.rpartition(".")
            if kind != "bias" or name in self.table.hf or base + ".weight" not in self._decodings:
                continue
            size = Region.full(tensor.shape).num_elements * DTYPE_BYTES[tensor.dtype]
            tile, values = memoryview(bytearray(1 << 16)), memoryview(bytearray(size))
            if any(self.stream(name, tile)(0, size, values)):
                raise CheckpointError(f"{self.path}: {name} is not zero, and the model's {base} has no bias")
            found[name] = "zeros: the bias of a quantised linear that has none in the model"
        return found

    def _original(self, name: str) -> str:
        """The tensor behind a name that may itself be a copy (a tied head)."""
        while name in self.table.dropped and self.table.dropped[name].same_as:
            name = self.table.dropped[name].same_as
        return name

    def check_repeats(self, names: Collection[str] | None = None) -> None:
        for name, original in self.repeats.items():
            if original in self._logical and (names is None or name in names):
                self._check_repeat(original, name, self.dropped[name])

    def stored_dtype(self, name: str) -> str:
        return self._stored[name].dtype

    def _check_repeat(self, original: str, name: str, reason: str) -> None:
        first, second = self._logical[original], self._logical[name]
        where = f"{self.path}: {name} ({reason})"
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            raise CheckpointError(
                f"{where} is {second.dtype} {list(second.shape)}, but {original} is {first.dtype} {list(first.shape)}"
            )
        a, b, tile = (memoryview(bytearray(1 << 20)) for _ in range(3))
        size = Region.full(second.shape).num_elements * DTYPE_BYTES[second.dtype]
        streams = [self.stream(each, tile) for each in (original, name)]
        for low in range(0, size, 1 << 20):
            high = min(size, low + (1 << 20))
            if streams[0](low, high, a) != streams[1](low, high, b):
                hint = "; set tie_word_embeddings to false to keep it" if name == HEAD else ""
                raise CheckpointError(f"{where} differs from {original}{hint}")


class HfSource(NamedSource):
    """The safetensors files of a Hugging Face directory, or else its pytorch_model.bin."""

    def __init__(self, path: Path, options: SourceOptions = _DEFAULTS) -> None:
        super().__init__(path, options.model_config or path, options)
        files = TORCH_BIN if TORCH_BIN.present(path) and not SAFETENSORS.present(path) else SAFETENSORS
        self.format = "safetensors" if files is SAFETENSORS else "pytorch_bin"
        self.all_tensors: Mapping[str, StoredTensor] = files.read_directory(path)
        if not self.all_tensors:
            raise CheckpointError(
                f"{path}: has neither {SAFETENSORS.single} nor {SAFETENSORS.index}, other *.safetensors, or "
                f"{TORCH_BIN.single}: no weights"
            )
        self._adopt(self.all_tensors)
        self.tensors = {name: self.all_tensors[self._first_input(name)] for name in self.table.hf}
        self.order = sorted(self.tensors, key=lambda n: (self.tensors[n].path, self.tensors[n].offset))

    def _first_input(self, name: str) -> str:
        decoding = self.decoding(name)
        return name if decoding is None else decoding.inputs[0]

    def places(self, name: str) -> list[Place]:
        tensor = self.all_tensors[name]
        return [Place(tensor.path, tensor.copy(name))]

    def extents(self) -> dict[str, list[tuple[int, int]]]:
        result: dict[str, list[tuple[int, int]]] = {}
        for tensor in self.all_tensors.values():
            result.setdefault(tensor.path.name, []).append((tensor.offset, tensor.nbytes))
        return result


class DcpSource(NamedSource):
    """A checkpoint that torch.distributed.checkpoint wrote, of tensors under their HF names (perhaps in a dict)."""

    format = "dcp"

    def __init__(self, path: Path, files: TorchDistSource, options: SourceOptions) -> None:
        super().__init__(path, config_home(path, options), options)
        self.files = files
        weights, self._prefix, dropped = strip_prefix(files.tensors, table_for(self.config).hf)
        self._adopt(weights)
        self.dropped |= dict.fromkeys(dropped, TRAINING_STATE)
        self.order = self.table.hf_order

    def places(self, name: str) -> list[Place]:
        key, tensor = self._prefix + name, self._stored[name]
        whole = Region.full(tensor.shape)
        piece = identity((name, key), whole, (whole.offsets, whole.offsets))
        result: list[Place] = []
        for chunk, _ in self.files.chunks(key).overlapping(whole):
            result += chunk_places(piece, tensor.shape, chunk, tensor.dtype, self.files.chunk_data(key, chunk))
        return result

    def extents(self) -> dict[str, list[tuple[int, int]]]:
        return {}

    def close(self) -> None:
        super().close()
        if hasattr(self, "files"):
            self.files.close()


def config_home(path: Path, options: SourceOptions) -> Path:
    """Where the config.json of a checkpoint lies that is no Hugging Face directory."""
    if options.model_config is not None:
        return options.model_config
    for home in (path / HF_FOLDER, path):
        if (home / "config.json").is_file():
            return home
    raise CheckpointError(
        f"{path}: has no {HF_FOLDER}/config.json, so its model is not known; give --model_config DIR with the Hugging "
        "Face config.json (and tokenizer), or put them there"
    )
