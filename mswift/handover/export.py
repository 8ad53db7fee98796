"""`mswift export`: a run's model or adapter as files, and to vllm through the gate."""

import json
from pathlib import Path

from mswift import rundir
from mswift.config.export import ExportConfig
from mswift.config.handover import HandoverConfig
from mswift.errors import ConfigError
from mswift.handover import gate
from mswift.train.export import export, trained_checkpoint
from mswift.tuners.export import is_adapter_checkpoint
from mswift.tuners.peft_config import CONFIG_FILE


def main(config: ExportConfig) -> int:
    """Export; to vllm: 1 where the gate does not let it pass. What the gate needs is looked for before."""
    checkpoint = trained_checkpoint(config)
    base = _base(config, checkpoint) if config.to == "vllm" and is_adapter_checkpoint(checkpoint) else None
    if base is not None and config.gate_engines:
        gate.check_form(base)
    export(config, checkpoint)
    if config.to != "vllm":
        return 0
    return gate.main(
        HandoverConfig(
            model=str(base or config.output_dir),
            adapters=config.output_dir if base else None,
            run=str(checkpoint),
            gate_engines=config.gate_engines,
            gate_text=config.gate_text,
            gate_tokens=config.gate_tokens,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            use_chat_template=config.use_chat_template,
        )
    )


def _base(config: ExportConfig, checkpoint: Path) -> Path:
    """The base model of a LoRA run."""
    said = json.loads((checkpoint / rundir.HF_FILES / CONFIG_FILE).read_text()).get("base_model_name_or_path")
    path = Path(config.base_model or said or "")
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ConfigError(f"--to vllm: the base of this adapter is not at {path}; name its directory: --base_model DIR")
    return path
