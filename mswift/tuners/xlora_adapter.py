"""The LoRAs that X-LoRA mixes, and its classifier, as a source of tensors: checked against the model, then read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from mswift.converters.layout import Region
from mswift.converters.plan import ModelTable
from mswift.errors import CheckpointError
from mswift.tuners.adapter import PeftAdapter
from mswift.tuners.method_adapter import AdapterFile
from mswift.tuners.peft_config import CONFIG_FILE, check_adapter_dir
from mswift.tuners.xlora import STORED_CLASSIFIER, XloraConfig
from mswift.tuners.xlora_files import lora_folders, parse_xlora
from mswift.tuners.xlora_modules import first_classifier


class XloraStart:
    """A new classifier over LoRAs from directories. Names as in `XloraConfig.shapes`.

    Raises CheckpointError for a damaged file.
    """

    def __init__(self, table: ModelTable, config: XloraConfig, folders: Sequence[Path]) -> None:
        self._loras = [PeftAdapter(folder) for folder in folders]
        self._classifier = first_classifier(table, config)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """CheckpointError unless the files of the LoRAs hold exactly these tensors."""
        for number, lora in enumerate(self._loras):
            own = f"{number}."
            lora.check({name.removeprefix(own): shape for name, shape in shapes.items() if name.startswith(own)})

    def read(self, name: str, region: Region) -> Tensor:
        """That region of a tensor."""
        if name.startswith(STORED_CLASSIFIER):
            return self._of_classifier(name, region)
        number, _, own = name.partition(".")
        return self._loras[int(number)].read(own, region)

    def _of_classifier(self, name: str, region: Region) -> Tensor:
        return self._classifier[name][tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))]


class XloraAdapter(XloraStart):
    """A directory of X-LoRA. ConfigError for another directory, CheckpointError for a damaged one."""

    modules_to_save: tuple[str, ...] = ()

    def __init__(self, path: Path, seed: int = 0) -> None:
        data = check_adapter_dir(path)
        self.config = parse_xlora(data, path / CONFIG_FILE, seed)
        self._loras = [PeftAdapter(folder) for folder in lora_folders(data, path / CONFIG_FILE)]
        self._file = AdapterFile(path)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """CheckpointError unless the files hold exactly these tensors."""
        own = {name: shape for name, shape in shapes.items() if name.startswith(STORED_CLASSIFIER)}
        missing = sorted(own.keys() - self._file.shapes.keys())
        if missing:
            raise CheckpointError(
                f"{self._file.file} lacks {missing[0]} {list(own[missing[0]])}: PEFT's save_pretrained (0.21.2) leaves "
                "out layers of the classifier whose number is that of a LoRA, and what was trained is not all there: "
                "export it from a checkpoint of mswift, or save model.state_dict() of these names by yourself"
            )
        self._file.check(own)
        super().check(shapes)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in the file's dtype."""
        if name.startswith(STORED_CLASSIFIER):
            return self._file.tensor(name)
        number, _, own = name.partition(".")
        return self._loras[int(number)].tensor(own)

    def _of_classifier(self, name: str, region: Region) -> Tensor:
        return self._file.read(name, region)
