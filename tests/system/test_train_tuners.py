"""Tuners of transformers models through the command: 6 steps = 3 + 3 bit for bit, the loss falls, what is saved."""

import os
from pathlib import Path
from typing import Any

import pytest

from mswift import rundir
from mswift.tuners.export import export_adapter
from tests.support.commands import PROGRAM, command, make_home, mswift, run
from tests.support.runs import log, tensors
from tests.support.xlora import make_loras

FSDP = ["--backend", "fsdp", "--nproc_per_node", "2"]
DDP = ["--backend", "ddp"]
STAGES = ["--nproc_per_node", "2", "--pipeline_model_parallel_size", "2"]
PRO = ["--tuner_type", "llamapro", "--llamapro_num_new_blocks", "2"]
LISA = ["--lisa_activated_layers", "1", "--lisa_step_interval", "2"]
BFLOAT = ["--packing", "--torch_dtype", "bfloat16"]
TEXT = '{"num_virtual_tokens": 8, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say it"}'
FASTER = ["--lr", "0.3"]
MIXED = '{"xlora_depth": 2, "xlora_size": 16, "use_trainable_adapters": true, "layerwise_scalings": true}'
PROJECTED = ["--tuner_config", '{"num_virtual_tokens": 8, "prefix_projection": true}']
ENDS = ("model.safetensors", "config.json")
CASES: dict[str, tuple[str, list[str]]] = {
    "llamapro": ("sft", [*FSDP, *PRO]),
    "lisa, packed, bfloat16": ("sft", [*FSDP, *LISA, *BFLOAT]),
    "adapter": ("sft", [*FSDP, "--tuner_type", "adapter", "--adapter_length", "8", "--torch_dtype", "bfloat16"]),
    "reft": ("sft", [*DDP, "--tuner_type", "reft", "--packing", "--save_hf_steps", "6"]),
    "prefix": ("sft", [*DDP, "--tuner_type", "prefix", "--save_hf_steps", "6", *PROJECTED, *BFLOAT[1:]]),
    "longlora": ("sft", [*DDP, "--tuner_type", "longlora", "--torch_dtype", "bfloat16"]),
}  # fmt: skip
if os.environ.get("MSWIFT_ALL_FAULTS"):
    CASES |= {
        "prompt, packed": (
            "sft",
            [*FSDP, "--tuner_type", "prompt", "--tuner_config", TEXT, "--packing", "--lr", "0.3"],
        ),
        "xlora": ("sft", [*FSDP, "--tuner_type", "xlora", "--tuner_config", MIXED, *BFLOAT, "--lr", "0.1"]),
        "llamapro, packed, bfloat16": ("sft", [*DDP, *PRO, *BFLOAT]),
        "lisa": ("sft", [*DDP, *LISA]),
        "longlora, cut": ("sft", [*FSDP, "--tuner_type", "longlora", "--torch_dtype", "bfloat16"]),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("tuners"))


@pytest.fixture(scope="module")
def loras(home: Path) -> list[str]:
    """The flag with those that X-LoRA mixes."""
    from transformers import AutoModelForCausalLM

    return ["--xlora_adapters", *make_loras(AutoModelForCausalLM.from_pretrained(home / "model"), home)]


@pytest.fixture(scope="module")
def whole(home: Path, loras: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six steps of a case at once, trained when first asked for."""
    made: dict[str, Path] = {}

    def trained(case: str) -> Path:
        if case not in made:
            kind, flags = CASES[case]
            made[case] = tmp_path_factory.mktemp("whole") / "run"
            run(command(home, kind, made[case], "--train_iters", "6", *flags, *(loras if case == "xlora" else ())))
        return made[case]

    return trained


@pytest.mark.parametrize("case", CASES)
def test_six_steps_are_three_and_three(home: Path, loras: list[str], tmp_path: Path, whole: Any, case: str) -> None:
    kind, flags = CASES[case]
    flags = [*flags, *(loras if case == "xlora" else ())]
    run(command(home, kind, tmp_path, "--train_iters", "3", *flags))
    assert "continuing after step 3" in run(command(home, kind, tmp_path, "--train_iters", "6", *flags))
    assert log(tmp_path) == log(whole(case))
    assert tensors(tmp_path / "checkpoint-6") == tensors(whole(case) / "checkpoint-6")


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls(whole: Any, case: str) -> None:
    losses = [row["loss"] for row in rundir.read_metrics(whole(case))]
    assert losses[-1] < losses[0] - 0.3, losses


def test_new_blocks_are_trained_by_megatron_as_well(home: Path, tmp_path: Path, whole: Any) -> None:
    """The checkpoint of three steps on two stages goes on, with its optimizer state, on transformers' model."""
    run(command(home, "sft", tmp_path, "--train_iters", "3", *PRO, *STAGES))
    run(command(home, "sft", tmp_path, "--train_iters", "6", *PRO, *FSDP))
    losses = [[row["loss"] for row in rundir.read_metrics(made)] for made in (tmp_path, whole("llamapro"))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def logits(model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model).eval()(tokens).logits


def test_a_model_with_new_blocks_starts_as_it_was_and_keeps_the_old_ones(
    home: Path, tmp_path: Path, whole: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    run(command(home, "sft", tmp_path / "start", "--train_iters", "0", *FSDP, *PRO))
    mswift("export", "--model", tmp_path / "start", "--output_dir", tmp_path / "first")
    mswift("export", "--model", whole("llamapro"), "--output_dir", tmp_path / "last")
    assert torch.equal(logits(tmp_path / "first"), logits(home / "model"))
    assert not torch.equal(logits(tmp_path / "last"), logits(home / "model"))
    first, last = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("first", "last"))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert {name.split(".")[2] for name in moved} == {"2", "5"}
    assert len(moved) == 2 * sum(name.startswith("model.layers.2.") for name in first)
    sizes = {name: tensor.numel() for name, tensor in first.items()}
    assert sum(sizes[name] for name in moved) == sum(s for n, s in sizes.items() if n.startswith("model.layers.1.")) * 2


def test_an_adapter_with_norms_and_embeddings_is_merged_and_loaded(home: Path, tmp_path: Path, whole: Any) -> None:
    import torch
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    mswift("export", "--model", whole("longlora"), "--output_dir", adapter)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        names = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.3.self_attn.q_norm.weight"} < names
    mswift("merge", "--model", home / "model", "--adapters", adapter, "--output_dir", merged)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(home / "model")
        loaded = PeftModel.from_pretrained(base, str(adapter)).eval()(tokens).logits
    torch.testing.assert_close(logits(merged), loaded, rtol=0, atol=1e-4)
    assert (logits(home / "model") - loaded).abs().max() > 1e-2
    answer = mswift(
        "infer", "--model", home / "model", "--adapters", adapter, "--prompt", "say 3", "--max_new_tokens", "4"
    )
    assert answer.strip()


@pytest.mark.parametrize("case", ["adapter", "reft"])
def test_what_changes_hidden_states_is_exported_and_used_and_not_merged(
    home: Path, tmp_path: Path, whole: Any, case: str
) -> None:
    import torch

    from mswift.infer.loading import ActiveAdapter, load_adapters, load_model
    from mswift.tuners.hidden_modules import Bottleneck, LoReft

    adapter = tmp_path / "adapter"
    said = mswift("export", "--model", whole(case), "--output_dir", adapter)
    assert "adapter of mswift's own written to" in said  # PEFT refuses it
    if case == "reft":
        snapshot = whole(case) / "hf-6"
        assert all((snapshot / name).read_bytes() == (adapter / name).read_bytes() for name in
                   ("adapter_config.json", "adapter_model.safetensors"))  # fmt: skip
    refused = run([*PROGRAM, "merge", "--model", str(home / "model"), "--adapters", str(adapter), "--output_dir",
                   str(tmp_path / "merged")], status=2)  # fmt: skip
    assert f"{case.upper()} changes hidden states, and no weight of the model: it cannot be merged" in refused
    tokens = torch.arange(40)[None]
    model = load_model(home / "model", None, torch.device("cpu"))
    with torch.no_grad():
        before = model(tokens).logits
        adapted = load_adapters(model, {"a": adapter})
        after = adapted(tokens).logits
        active = ActiveAdapter(adapted, ["a"])
        active.use(None)
        assert torch.equal(adapted(tokens).logits, before)
        active.use("a")
        assert torch.equal(adapted(tokens).logits, after)
    assert (after - before).abs().max() > 1e-2
    stored = tensors(whole(case) / "checkpoint-6")
    loaded = {
        f"adapter.{place}.{name}": tensor
        for place, module in adapted.named_modules() if isinstance(module, Bottleneck | LoReft)
        for name, tensor in module.named_parameters()
    }  # fmt: skip
    trained = {name: data for name, data in stored.items() if name.startswith("adapter.")}
    assert loaded.keys() == trained.keys()
    for name, tensor in loaded.items():
        kept = torch.frombuffer(bytearray(trained[name]), dtype=torch.bfloat16 if case == "adapter" else torch.float32)
        assert torch.equal(tensor.detach().flatten(), kept.float()), name
    answer = mswift(
        "infer", "--model", home / "model", "--adapters", adapter, "--prompt", "say 3", "--max_new_tokens", "4"
    )
    assert answer.strip()


def test_virtual_tokens_are_exported_and_used_and_not_merged(home: Path, tmp_path: Path, whole: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tmp_path / "adapter"
    mswift("export", "--model", whole("prefix"), "--output_dir", adapter)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (whole("prefix") / "hf-6" / name).read_bytes() == (adapter / name).read_bytes()
    refused = run([*PROGRAM, "merge", "--model", str(home / "model"), "--adapters", str(adapter), "--output_dir",
                   str(tmp_path / "merged")], status=2)  # fmt: skip
    assert "PREFIX_TUNING puts virtual tokens before every sequence, and changes no weight of the model" in refused
    asked = ["--prompt", "say 3", "--max_new_tokens", "4", "--temperature", "0"]
    answer = mswift("infer", "--model", home / "model", "--adapters", adapter, *asked)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    chat = [{"role": "user", "content": "say 3"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "model"), str(adapter)).eval()
    ids, given = tokens["input_ids"], tokens["input_ids"].shape[1]
    with torch.no_grad():
        while ids.shape[1] < given + 4 and int(ids[0, -1]) != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer.strip().endswith(tokenizer.decode(ids[0, given:], skip_special_tokens=True).strip())


def test_a_mixture_is_trained_published_and_read_by_peft(home: Path, loras: list[str], tmp_path: Path) -> None:
    """The directory of a snapshot is that of an export; PEFT and `mswift infer` answer alike."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = [*DDP, "--tuner_type", "xlora", *loras, "--tuner_config", MIXED, "--save_hf_steps", "3"]
    run(command(home, "sft", tmp_path / "run", "--train_iters", "3", *flags))
    export_adapter(tmp_path / "run" / "checkpoint-3", tmp_path / "adapter")
    snapshot, adapter = tmp_path / "run" / "hf-3", tmp_path / "adapter"
    for name in ("adapter_model.safetensors", *(f"{n}/adapter_{end}" for n in range(3) for end in ENDS)):
        assert (snapshot / name).read_bytes() == (adapter / name).read_bytes(), name
    answer = mswift("infer", "--model", home / "model", "--adapters", snapshot, "--prompt", "say 3",
                    "--max_new_tokens", "4", "--temperature", "0")  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    chat = [{"role": "user", "content": "say 3"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    base.config.use_cache = False
    ids = tokens["input_ids"]
    with torch.no_grad():
        made = (
            PeftModel.from_pretrained(base, str(snapshot)).eval().generate(**tokens, max_new_tokens=4, do_sample=False)
        )
    assert answer.strip().endswith(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
