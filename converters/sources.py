"""Where a model's weights come from: Hugging Face files, a torch_dist directory, or a plain DCP checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from mswift.converters.io.dcp_metadata import METADATA
from mswift.converters.io.megatron_lm import check_args, resolve, strip_prefix
from mswift.converters.io.torch_dist import other_name
from mswift.converters.io.torch_dist_reader import TensorInfo, TorchDistSource
from mswift.converters.layout import Region
from mswift.converters.manifest import read_manifest
from mswift.converters.named_sources import HEAD, HF_FOLDER, TRAINING_STATE, DcpSource, HfSource, config_home
from mswift.converters.plan import DTYPE_BYTES, table_for
from mswift.converters.source import Place, Source, SourceOptions, check_shapes, chunk_places, run_of_bytes
from mswift.errors import CheckpointError

__all__ = [
    "HEAD",
    "HF_FOLDER",
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

_ADAPTER = "adapter."
_DEFAULTS = SourceOptions()


class MegatronSource(Source):
    """The model tensors of a torch_dist directory, checked against the table of its config.

    The config lies in its hf/ folder, or is given. `dropped` names the rows of a padded vocabulary, and state of
    training that a foreign program stored beside the weights.
    """

    format = "torch_dist"

    def __init__(self, path: Path, options: SourceOptions = _DEFAULTS, files: TorchDistSource | None = None) -> None:
        self.files = files or TorchDistSource(path)
        super().__init__(path, config_home(path, options), options)
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
        self.dropped = padding | (dict.fromkeys(state, TRAINING_STATE) if foreign else {})
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


def open_source(path: Path, options: SourceOptions = _DEFAULTS) -> Source:
    """The weights in that directory; strict: CheckpointError for a missing, extra or misshapen tensor."""
    path = resolve(Path(path))
    if not ((path / METADATA).exists() or any(path.glob("*.distcp"))):
        return HfSource(path, options)
    files = TorchDistSource(path)
    if files.is_megatron:
        return MegatronSource(path, options, files)
    return DcpSource(path, files, options)
