"""What a live engine writes as Hugging Face files is what `export` makes of its checkpoint, bit for bit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mswift.train.saver import Saver
from mswift.tuners.export import export_adapter
from tests.support.family_configs import FAMILY_CONFIGS
from tests.support.parity import VOCAB, model_of, random_model, random_steps
from tests.support.ranks import join, run_ranks

HERE = "tests/cpu/test_snapshot.py"
TWO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fsdp": ({}, {"backend": "fsdp", "shard_size": 2}),
    "megatron": ({"tp": 2, "sequence_parallel": True}, {"backend": "megatron"}),
}
"""Engine -> (layout of two ranks, settings)."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    dense: Any = random_model("qwen3", num_hidden_layers=2, vocab_size=VOCAB)
    dense.save_pretrained(folder / "dense")
    experts: Any = model_of(FAMILY_CONFIGS["qwen2_moe"] | {"model_type": "qwen2_moe", "vocab_size": VOCAB})
    experts.save_pretrained(folder / "experts")
    return folder


@pytest.mark.parametrize("backend", TWO)
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("dense", {"init": "pissa", "target_modules": ["q_proj", "down_proj"]}),
        ("dense", {"init": "olora", "target_modules": ["all-linear"], "rslora": True}),
        ("experts", {"target_modules": ["all-linear"]}),
    ],
)
def test_an_adapter_in_training_is_written_as_it_is_exported(
    home: Path, tmp_path: Path, backend: str, model: str, flags: dict[str, Any]
) -> None:
    """PiSSA and OLoRA as plain LoRAs; the shared expert's linears are called as those of experts are."""
    payload = {"model": home / model, "flags": flags, "run": tmp_path, "backend": backend}
    written, saved, live = run_ranks(2, f"{HERE}:trained", payload)[0]
    export_adapter(saved, tmp_path / "exported")
    names = {path.name for path in (tmp_path / "exported").iterdir()}
    assert names == {path.name for path in written.iterdir()}
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    if live is not None:
        assert (live / "adapter_model.safetensors").read_bytes() == (written / "adapter_model.safetensors").read_bytes()


def trained(payload: Mapping[str, Any]) -> tuple[Path, Path, Path | None]:
    """One step; the snapshot, the checkpoint, and what a live Megatron engine hands to others of a plain LoRA."""
    from torch.distributed import get_rank

    from mswift.converters.reader import WeightReader
    from mswift.parallel.batch import Microbatch
    from mswift.train.side_files import side_files
    from mswift.train.snapshot import Snapshot
    from mswift.train.weight_stream import write_live_adapter
    from mswift.tuners.lora import LoraConfig
    from tests.support.engines import make_engine
    from tests.support.methods import _save

    degrees, settings = TWO[payload["backend"]]
    dims, device = join(2, **degrees)
    reader, run = WeightReader(payload["model"]), payload["run"]
    lora = LoraConfig.for_table(reader.table, rank=4, alpha=8, **payload["flags"])
    engine = make_engine(reader.table, dims, settings | {"lora": lora, "dtype": "BF16"}, device)
    engine.load_weights(reader)
    step = [Microbatch(*batch) for batch in random_steps(1)[0]]
    engine.train_step(step[engine.coordinate.dp :: dims.dp], 1e-2)
    files = {"adapter_config.json": side_files(reader, engine.config, "base")["adapter_config.json"]}
    written = Snapshot(run, 1, get_rank(), files).write(engine)
    saved = _save(engine, reader, run)
    live = None
    if payload["backend"] == "megatron" and lora.settings.init == "true":
        live = run / "live"
        write_live_adapter(engine, live)
    engine.close()
    return written, saved, live


@pytest.mark.parametrize("flag", ["new_special_tokens", "chat_template", None])
def test_what_an_adapter_means_nothing_without_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str | None
) -> None:
    """In a snapshot as in an export: the tokenizer of new tokens, another chat template."""
    from types import SimpleNamespace

    from mswift.config.train import SftConfig
    from mswift.train import saver

    seen: dict[str, Any] = {}

    class Written:
        def __init__(self, _output: Path, _step: int, _rank: int, files: Mapping[str, bytes]) -> None:
            seen.update(files)

        def write(self, _engine: object) -> Path:
            return tmp_path

    monkeypatch.setattr(saver, "Snapshot", Written)
    given = {"new_special_tokens": ("<x>",), "chat_template": "t.jinja"}
    own = {flag: given[flag]} if flag else {}
    files = dict.fromkeys(("adapter_config.json", "config.json", "tokenizer.json", "chat_template.jinja"), b"{}")
    config = SftConfig(model="m", tuner_type="lora", **own)  # type: ignore[arg-type]
    engine = SimpleNamespace(config=SimpleNamespace(trains_adapter=True))
    run: Any = SimpleNamespace(config=config, rank=0, engine=engine, hf_files=files, output_dir=tmp_path)
    Saver(run)._snapshot(1)
    beside = {"tokenizer.json", "chat_template.jinja"} if flag else set()
    assert seen.keys() == {"adapter_config.json"} | beside
