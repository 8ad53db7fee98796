"""X-LoRA without torch: counts by the formula, what a directory says, what is refused."""

import dataclasses
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.main import main
from mswift.config.train import SftConfig
from mswift.converters.plan import table_for
from mswift.errors import ConfigError
from mswift.refusals import train_refusals
from mswift.train.identity import check_adapter
from mswift.train.trained import trained_parameters
from mswift.tuners.library_config import TunerConfig
from mswift.tuners.peft_config import parse_peft_config, peft_config
from mswift.tuners.settings import PeftSettings
from mswift.tuners.xlora import check_fits, xlora_config
from mswift.tuners.xlora_files import directory_configs, parse_xlora
from tests.support.family_configs import family_config

TABLE = table_for(family_config("llama"))
LAYERS, HIDDEN = 3, 32
"""Of the tiny Llama."""
FINE = SftConfig(model="m", dataset=("a.jsonl",), train_iters=1, backend="fsdp", tuner_type="xlora")
LORAS = (PeftSettings(4, 8, ("q_proj", "o_proj")), PeftSettings(2, 8, ("q_proj", "down_proj"), rslora=True))
LINEARS = 3 * LAYERS
"""q, o and down projections: those with a LoRA."""


def write_lora(folder: Path, settings: PeftSettings, **fields: Any) -> str:
    folder.mkdir()
    content = peft_config(settings, settings.modules_to_save, base_model=None, tied=False) | fields
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def loras(tmp_path: Path) -> tuple[str, ...]:
    return tuple(write_lora(tmp_path / f"lora-{number}", lora) for number, lora in enumerate(LORAS))


def run(loras: tuple[str, ...], **fields: Any) -> SftConfig:
    text = json.dumps(fields) if fields else None
    return dataclasses.replace(FINE, xlora_adapters=loras, tuner_config=text)


def of_rank(rank: int, *leaves: tuple[int, int]) -> int:
    return LAYERS * sum(rank * (inputs + outputs) for inputs, outputs in leaves)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, HIDDEN * 2 + 2),
        ({"layerwise_scalings": True}, HIDDEN * 2 * LINEARS + 2 * LINEARS),
        ({"xlora_depth": 2, "xlora_size": 5}, HIDDEN * 5 + 5 + 5 * 2 + 2),
        (
            {"xlora_depth": 4, "xlora_size": 5, "layerwise_scalings": True},
            HIDDEN * 5 + 5 + 2 * (5 * 5 + 5) + 5 * 2 * LINEARS + 2 * LINEARS,
        ),
        (
            {"use_trainable_adapters": True},
            HIDDEN * 2 + 2 + of_rank(4, (32, 32), (32, 32)) + of_rank(2, (32, 32), (TABLE.spec.ffn_hidden_size, 32)),
        ),
    ],
)
def test_trained_parameters(loras: tuple[str, ...], fields: dict[str, Any], count: int) -> None:
    config = run(loras, **fields)
    assert trained_parameters(config, TABLE) == count
    assert train_refusals(config, TABLE.spec, 2) == []


def test_a_configuration_is_read_as_it_is_written(loras: tuple[str, ...], tmp_path: Path) -> None:
    """Of a checkpoint; and of a directory, as PEFT has it."""
    own = xlora_config(TABLE, {"top_k_lora": 1, "softmax_temperature": 2}, loras, 5)
    text = own.text(TABLE, (), "base")
    path = tmp_path / "out" / "adapter_config.json"
    assert shapes(parse_xlora(json.loads(text), path, 5)) == shapes(own)
    files = {name: json.loads(data) for name, data in directory_configs(text, tmp_path / "out").items()}
    assert set(files) == {"adapter_config.json", "0/adapter_config.json", "1/adapter_config.json"}
    main_file = files.pop("adapter_config.json")
    assert main_file["adapters"] == {"0": str(tmp_path / "out" / "0"), "1": str(tmp_path / "out" / "1")}
    assert main_file["top_k_lora"] == 1
    assert main_file.keys().isdisjoint({"loras"})
    assert [files[f"{number}/adapter_config.json"]["r"] for number in range(2)] == [4, 2]
    assert {content["base_model_name_or_path"] for content in files.values()} == {"base"}
    assert directory_configs(b'{"peft_type": "LORA"}', tmp_path) == {"adapter_config.json": b'{"peft_type": "LORA"}'}


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = config.shapes(TABLE)
    return found


def test_eleven_loras_stay_in_order(tmp_path: Path) -> None:
    """Which PEFT sorts by name where it writes them: 0 1 10 2."""
    ranked = [PeftSettings(rank, 8, ("q_proj",)) for rank in range(1, 12)]
    paths = [write_lora(tmp_path / f"lora-{lora.rank}", lora) for lora in ranked]
    files = directory_configs(xlora_config(TABLE, {}, paths).text(TABLE, (), None), tmp_path / "out")
    main_file = json.loads(files["adapter_config.json"])
    assert list(main_file["adapters"]) == [str(number) for number in range(11)]
    assert [json.loads(files[f"{number}/adapter_config.json"])["r"] for number in range(11)] == list(range(1, 12))


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"xlora_dept": 2}, "xlora has no field 'xlora_dept'; near: xlora_depth"),
    "type": ({"xlora_depth": "2"}, "xlora_depth '2' must be a whole number"),
    "a bool is no number": ({"softmax_temperature": True}, "must be a number"),
    "depth": ({"xlora_depth": 0}, "xlora_depth 0 must be at least 1"),
    "dropout": ({"xlora_depth": 2, "xlora_dropout_p": 1.0}, "xlora_dropout_p 1 must be at least 0 and below 1"),
    "temperature": ({"softmax_temperature": 0}, "softmax_temperature 0 must be above 0"),
    "top k": ({"top_k_lora": 3}, "top_k_lora 3 of 2 LoRAs: use 2 or less"),
    "softmax of all": ({"enable_softmax_topk": True}, "give top_k_lora too"),
    "size": ({"xlora_size": 64}, "xlora_size 64 has no effect with xlora_depth 1"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_that_do_not_fit_are_refused(loras: tuple[str, ...], case: str) -> None:
    fields, text = FIELDS[case]
    with pytest.raises(ConfigError, match=text):
        trained_parameters(run(loras, **fields), TABLE)


KINDS: dict[str, tuple[PeftSettings, dict[str, Any], str]] = {
    "DoRA": (PeftSettings(4, 8, ("q_proj",), dora=True), {}, "it is a DoRA, and X-LoRA mixes LoRAs of linears alone"),
    "biases": (PeftSettings(4, 8, ("q_proj",), lora_bias=True), {"lora_bias": True}, r"has biases \(lora_bias\)"),
    "modules": (PeftSettings(4, 8, ("q_proj",), ("lm_head",)), {}, r"replaces lm_head \(modules_to_save\)"),
    "no linear": (PeftSettings(4, 8, ("c_attn",)), {}, "match no linear of the model"),
    "another method": (PeftSettings(4, 8, ("q_proj",)), {"peft_type": "OFT"}, "peft_type='OFT'; this takes LORA only"),
    "start in the base": (PeftSettings(4, 8, ("q_proj",)), {"init_lora_weights": "pissa"}, "has changed the base"),
}


@pytest.mark.parametrize("case", KINDS)
def test_loras_that_are_not_mixed_are_refused(tmp_path: Path, case: str) -> None:
    settings, fields, text = KINDS[case]
    with pytest.raises(ConfigError, match=text):
        trained_parameters(run((write_lora(tmp_path / "lora", settings, **fields),)), TABLE)


def test_experts_are_not_mixed(tmp_path: Path) -> None:
    table = table_for(family_config("qwen3_moe"))
    lora = PeftSettings(4, 8, ("q_proj",), target_parameters=("mlp.experts.down_proj",))
    with pytest.raises(ConfigError, match=r"it adapts .*experts.down_proj, which is no linear"):
        xlora_config(table, {}, [write_lora(tmp_path / "lora", lora)])


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "kv_b_proj"), ("qwen2_moe", "shared_expert.down_proj")])
def test_linears_of_other_rows_are_not_mixed(tmp_path: Path, family: str, name: str) -> None:
    lora = write_lora(tmp_path / "lora", PeftSettings(4, 8, ("o_proj", name)))
    with pytest.raises(ConfigError, match=rf"adapts model.*{name}, whose inputs are not one for each token of a row"):
        xlora_config(table_for(family_config(family)), {}, [lora])


@pytest.mark.parametrize(
    ("places", "fields", "is_refused"),
    [
        ((0,), {}, True),
        ((0,), {"top_k_lora": 1}, True),
        ((0, 0), {}, True),
        ((0, 0), {"top_k_lora": 1}, False),
        ((0,), {"enable_softmax": False}, False),
        ((0,), {"use_trainable_adapters": True}, False),
        ((0, 0, 1), {}, False),
    ],
)
def test_scales_that_nothing_depends_on_are_refused(
    loras: tuple[str, ...], places: tuple[int, ...], fields: dict[str, Any], is_refused: bool
) -> None:
    spelled = [f"{loras[place]}/../{Path(loras[place]).name}" if n else loras[place] for n, place in enumerate(places)]
    made = run(tuple(spelled), **fields)
    if not is_refused:
        assert trained_parameters(made, TABLE)
        return
    with pytest.raises(ConfigError, match="--xlora_adapters .*of one LoRA nothing would be learned: name two"):
        trained_parameters(made, TABLE)


def test_no_lora_and_no_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name them, --xlora_adapters DIR DIR"):
        trained_parameters(FINE, TABLE)
    with pytest.raises(ConfigError, match="--xlora_adapters .*none: no such directory; give a PEFT directory"):
        trained_parameters(run((str(tmp_path / "none"),)), TABLE)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "megatron"}, "--tuner_type xlora is computed by PEFT on transformers' model: use --backend fsdp"),
        ({"backend": "deepspeed", "deepspeed": "zero3"}, "--tuner_type xlora keeps its LoRAs whole on every rank"),
        ({"tuner_type": "lora"}, "--xlora_adapters a b has no effect with --tuner_type lora: use --tuner_type xlora"),
        ({"lora_rank": 4}, "--lora_rank 4 has no effect with --tuner_type xlora"),
        ({"target_modules": ("q_proj",)}, "--target_modules q_proj has no effect with --tuner_type xlora"),
        ({"quant_method": "bnb", "quant_bits": 4}, "--quant_method bnb has no effect with --tuner_type xlora"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha 5.0 with --tuner_type xlora"),
        ({"torch_compile": True}, "--torch_compile with --tuner_type xlora"),
        ({"new_special_tokens": ("<a>",)}, "--new_special_tokens <a> with --tuner_type xlora"),
        ({"fsdp_cpu_offload": True}, "parameters of --tuner_type xlora are not all cut"),
        ({"adapters": ("a", "b")}, "--adapters names 2 adapters; training continues 1 adapter"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(change: dict[str, Any], text: str) -> None:
    found = [str(r) for r in train_refusals(dataclasses.replace(run(("a", "b")), **change), TABLE.spec, 2)]
    assert any(text in refusal for refusal in found), found


def test_a_mixture_is_continued_as_it_is(loras: tuple[str, ...], tmp_path: Path) -> None:
    made, out = xlora_config(TABLE, {"layerwise_scalings": True}, loras), tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_bytes(made.text(TABLE, (), None))
    goes_on = dataclasses.replace(FINE, adapters=(str(out),))
    assert trained_parameters(goes_on, TABLE) == sum(map(prod, made.classifier_shapes(TABLE).values()))
    with pytest.raises(ConfigError, match="--xlora_adapters with --adapters .* leave one out"):
        trained_parameters(dataclasses.replace(goes_on, xlora_adapters=loras), TABLE)
    with pytest.raises(ConfigError, match="is LORA: it is for an X-LoRA to go on with"):
        trained_parameters(dataclasses.replace(FINE, adapters=loras[:1]), TABLE)
    with pytest.raises(ConfigError, match="reads 32 hidden features, the model has 48"):
        check_fits(made, table_for(family_config("llama") | {"hidden_size": 48}), out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"adapters": {"a": "x"}}, "the LoRAs must be named 0, 1, ..., as PEFT computes them"),
        ({"adapters": {"0": "/nowhere/0"}}, "LoRA 0 lies neither in .*/0 nor in /nowhere/0: put its PEFT directory"),
        ({"hidden_size": None}, "hidden_size None must be a number"),
        ({"use_magic": True}, "use_magic=True is not supported by mswift for XLORA"),
    ],
)
def test_directories_that_do_not_say_what_they_hold_are_refused(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    data = {"peft_type": "XLORA", "hidden_size": HIDDEN, "adapters": {"0": str(tmp_path / "x")}} | change
    with pytest.raises(ConfigError, match=text):
        parse_xlora(data, tmp_path / "adapter_config.json")


def test_a_run_goes_on_with_its_own_loras(loras: tuple[str, ...], tmp_path: Path) -> None:
    made, more = (xlora_config(TABLE, {}, paths).text(TABLE, (), "m") for paths in (loras, (*loras, loras[0])))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "adapter_config.json").write_bytes(made)
    check_adapter(tmp_path, made)
    with pytest.raises(ConfigError, match=r"--xlora_adapters: .* 2 LoRAs, of ranks 4 2, the command means 3 LoRAs"):
        check_adapter(tmp_path, more)


def test_what_takes_lora_only_says_who_serves_it(loras: tuple[str, ...]) -> None:
    content = xlora_config(TABLE, {}, loras).content()
    with pytest.raises(ConfigError, match="'XLORA' mixes LoRAs token by token, .* transformers serves it"):
        parse_peft_config(content, Path("f"))
    with pytest.raises(ConfigError, match="train it by mswift sft --tuner_type xlora"):
        TunerConfig("xlora").peft_config()


def test_the_dry_run_says_what_is_trained(
    loras: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(family_config("llama")))
    (tmp_path / "data.jsonl").write_text('{"query": "a", "response": "b"}\n')
    argv = ["sft", "--dry_run", "--model", str(tmp_path), "--dataset", str(tmp_path / "data.jsonl")]
    argv += ["--train_iters", "3", "--tuner_type", "xlora", "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--backend", "ddp", "--xlora_adapters", *loras]) == 0
    said = capsys.readouterr().out
    assert "tuner          xlora, 2 LoRAs, mixed token by token in a second pass" in said
    assert f"{HIDDEN * 2 + 2}" in said
    assert main([*argv, "--backend", "ddp"]) == 2  # LoRAs forgotten: the refusal, no traceback
    assert "refused: --tuner_type xlora mixes LoRAs that were trained before: name them" in capsys.readouterr().out
