"""Where a model's weights come from: Hugging Face files, a torch_dist directory, or a plain DCP checkpoint."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mswift.converters.decode import HasShape, dequantised
from mswift.converters.io.dcp_metadata import METADATA
from mswift.converters.io.megatron_lm import check_args, resolve, strip_prefix
from mswift.converters.io.safetensors import SAFETENSORS
from mswift.converters.io.stored import StoredTensor
from mswift.converters.io.torch_bin import TORCH_BIN
from mswift.converters.io.torch_dist import TensorInfo, TorchDistSource, other_name
from mswift.converters.layout import Region, identity
from mswift.converters.manifest import read_manifest
from mswift.converters.plan import DTYPE_BYTES, table_for
from mswift.converters.quantization import FIELD, quantization_of
from mswift.converters.source import Place, Source, SourceOptions, check_shapes, chunk_places, run_of_bytes
from mswift.errors import CheckpointError

__all__ = [
    "DcpSource",
    "HfSource",
    "MegatronSource",
    "Place",
    "Source",
    "SourceOptions",
    "chunk_places",
    "open_source",
    "run_of_bytes",
]

HF_FOLDER = "hf"
_ADAPTER = "adapter."
_TRAINING_STATE = "state of training (optimizer, random numbers); weights only are converted"
HEAD = "lm_head.weight"
_DEFAULTS = SourceOptions()


class _NamedSource(Source):
    """Tensors stored under their HF names, some of them perhaps quantised."""

    def _adopt(self, stored: Mapping[str, HasShape]) -> None:
        """Takes the stored tensors in: dequantises, drops, checks."""
        quantization = quantization_of(self.config)
        if quantization is not None:
            made = dequantised(stored, quantization, self.options.dtype or "BF16")
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
        self.repeats = {name: self._original(drop.same_as) for name, drop in drops.items() if drop.same_as}
        kept = {name: tensor for name, tensor in logical.items() if name not in self.dropped}
        check_shapes(str(self.path), {n: t.shape for n, t in kept.items()}, self.table.hf)
        self._cast_all(self.table.has_own_dtype)
        self.dtype = self._one_dtype(self.table.has_own_dtype)

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


class HfSource(_NamedSource):
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


class DcpSource(_NamedSource):
    """A checkpoint that torch.distributed.checkpoint wrote, of tensors under their HF names (perhaps in a dict)."""

    format = "dcp"

    def __init__(self, path: Path, files: TorchDistSource, options: SourceOptions) -> None:
        super().__init__(path, _config_home(path, options), options)
        self.files = files
        weights, self._prefix, dropped = strip_prefix(files.tensors, table_for(self.config).hf)
        self._adopt(weights)
        self.dropped |= dict.fromkeys(dropped, _TRAINING_STATE)
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


class MegatronSource(Source):
    """The model tensors of a torch_dist directory, checked against the table of its config.

    The config lies in its hf/ folder, or is given. `dropped` names the rows of a padded vocabulary, and state of
    training that a foreign program stored beside the weights.
    """

    format = "torch_dist"

    def __init__(self, path: Path, options: SourceOptions = _DEFAULTS, files: TorchDistSource | None = None) -> None:
        self.files = files or TorchDistSource(path)
        super().__init__(path, _config_home(path, options), options)
        recorded = read_manifest(path)
        self.table = table_for(self.config, recorded.tensors if recorded else self.files.tensors)
        weights, self._prefix, state = self._weights()
        if weights and all(name.startswith(_ADAPTER) for name in weights):
            raise CheckpointError(
                f"{path}: holds a LoRA adapter and no model weights; give the base model here and the adapter to "
                "--adapters (mswift export writes it, mswift merge folds it in)"
            )
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        padding = self._cut_padding(shapes)
        check_shapes(str(path), shapes, {key: t.shape for key, t in self.table.megatron.items()})
        check_args(path, self.table.spec)
        foreign = not (path / HF_FOLDER).is_dir()
        self.dropped = padding | (dict.fromkeys(state, _TRAINING_STATE) if foreign else {})
        own = self.table.has_own_dtype
        self._cast_all(own)
        self.dtype = self._one_dtype(own)
        self.order = self.table.hf_order

    def _weights(self) -> tuple[dict[str, TensorInfo], str, Sequence[str]]:
        """`strip_prefix` of the files, tensors under the names of the table: some of megatron-core's have two."""
        found = strip_prefix(self.files.tensors, self.table.megatron)
        prefix = found[1]
        names = {prefix + other_name(key): prefix + key for key in self.table.megatron if other_name(key)}
        self.files.rename({name: key for name, key in names.items() if name in self.files.tensors})
        return strip_prefix(self.files.tensors, self.table.megatron)

    def _cut_padding(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
        """Takes the rows behind the vocabulary off `shapes`; returns name of the rows -> reason."""
        dropped = {}
        for key, tensor in self.table.megatron.items():
            shape, cut_rule = shapes.get(key), tensor.rule.cut
            if shape is None or cut_rule is None or not cut_rule.uneven or shape[1:] != tensor.shape[1:]:
                continue
            rows = tensor.shape[0]
            if shape[0] > rows:
                shapes[key] = tensor.shape
                dropped[f"{key}[{rows}:{shape[0]}]"] = f"{shape[0] - rows} rows that pad the vocabulary of {rows}"
        return dropped

    def key(self, name: str) -> str:
        """Megatron tensor that holds an HF tensor, as it is called in the files."""
        return self._prefix + self.table.hf_pieces[name][0].names[1]

    def stored_dtype(self, name: str) -> str:
        return self.files.tensors[self.key(name)].dtype

    def read(self, key: str, region: Region, out: memoryview) -> None:
        """Fills `out` with the C-order bytes of a region of a Megatron tensor."""
        shape = self.table.megatron[key].shape
        if region.intersect(Region.full(shape)) != region:
            raise CheckpointError(f"{self.path}: {key} has shape {list(shape)}; {region} lies outside")
        self.files.read(self._prefix + key, region, out)

    def places(self, name: str) -> list[Place]:
        shape, result = self.table.hf[name], list[Place]()
        dtype = self.stored_dtype(name)
        for piece in self.table.hf_pieces[name]:
            key = self._prefix + piece.names[1]
            for chunk, _ in self.files.chunks(key).overlapping(piece.hull(1)):
                result += chunk_places(piece, shape, chunk, dtype, self.files.chunk_data(key, chunk))
        return result

    def extents(self) -> dict[str, list[tuple[int, int]]]:
        result: dict[str, list[tuple[int, int]]] = {}
        for key, tensor in self.table.megatron.items():
            name = self._prefix + key
            for chunk, _ in self.files.chunks(name).overlapping(Region.full(tensor.shape)):
                path, offset = self.files.chunk_data(name, chunk)
                item_bytes = DTYPE_BYTES[self.files.tensors[name].dtype]
                result.setdefault(path.name, []).append((offset, chunk.num_elements * item_bytes))
        return result

    def close(self) -> None:
        super().close()
        self.files.close()


def _config_home(path: Path, options: SourceOptions) -> Path:
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


def open_source(path: Path, options: SourceOptions = _DEFAULTS) -> Source:
    """The weights in that directory; strict: CheckpointError for a missing, extra or misshapen tensor."""
    path = resolve(Path(path))
    if not ((path / METADATA).exists() or any(path.glob("*.distcp"))):
        return HfSource(path, options)
    files = TorchDistSource(path)
    if files.is_megatron:
        return MegatronSource(path, options, files)
    return DcpSource(path, files, options)
