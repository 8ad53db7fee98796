"""What --target_modules and --target_parameters mean on a mixture of experts. Oracle for PEFT's side: tests/cpu."""

import pytest

from mswift.converters.plan import ModelTable, table_for
from mswift.errors import ConfigError
from mswift.tuners.lora import LoraConfig
from mswift.tuners.settings import PeftSettings
from mswift.tuners.targets import chosen, renamed
from tests.support.family_configs import family_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def table(family: str) -> ModelTable:
    return table_for(family_config(family))


def settings(family: str, *names: str, parameters: tuple[str, ...] = ()) -> PeftSettings:
    return chosen(table(family), rank=4, alpha=8, modules=names, parameter_names=parameters)


def test_older_names_come_from_the_tables() -> None:
    assert renamed(table("qwen3_moe")) == {
        "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj", "gate": "gate.weight",
    }  # fmt: skip
    assert renamed(table("mixtral")) == {
        "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate": "gate.weight",
    }  # fmt: skip
    assert renamed(table("qwen2_moe")) == renamed(table("gpt_oss")) == renamed(table("llama")) == {}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"])
def test_all_linear_is_attention_experts_and_router(family: str) -> None:
    found = settings(family, "all-linear")
    assert found.target_modules == ATTENTION
    assert found.target_parameters == ("down_proj", "gate.weight", "gate_up_proj")
    assert found.rank_pattern == {r".*\.gate_up_proj": 8}
    assert found.alpha_pattern == {r".*\.gate_up_proj": 16}


def test_all_linear_covers_the_shared_expert_where_peft_can_name_it() -> None:
    found = settings("qwen2_moe", "all-linear")
    assert set(found.target_modules) == {*ATTENTION, "gate_proj", "up_proj", "down_proj", "shared_expert_gate"}
    assert found.target_parameters == ("down_proj", "gate.weight", "gate_up_proj")
    assert settings("qwen2_moe", "gate_proj").target_parameters == ()


def test_some_of_the_names() -> None:
    found = settings("qwen3_moe", "q_proj", "down_proj")
    assert (found.target_modules, found.target_parameters, found.rank_pattern) == (("q_proj",), ("down_proj",), {})
    found = settings("gpt_oss", "q_proj", parameters=("experts.down_proj",))
    assert (found.target_modules, found.target_parameters) == (("q_proj",), ("experts.down_proj",))
    with pytest.raises(
        ConfigError, match=r"--target_modules gate_proj: .* in one parameter, gate_up_proj: add up_proj"
    ):
        settings("qwen3_moe", "gate_proj")


@pytest.mark.parametrize(
    ("family", "names", "parameters", "message"),
    [
        ("gpt_oss", ("all-linear",), (), "gate and up lie in turn in gate_up_proj.*use --target_modules q_proj"),
        ("qwen3_moe", ("w1",), (), "--target_modules w1: .*known: all-linear q_proj"),
        ("qwen3_moe", (), ("experts.gate_proj",), "--target_parameters experts.gate_proj: .*known: .*gate_up_proj"),
        ("llama", (), ("down_proj",), "--target_parameters down_proj: the model has no experts"),
        ("llama", (), (), "--target_modules is empty"),
    ],
)
def test_refused(family: str, names: tuple[str, ...], parameters: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(family, *names, parameters=parameters)


@pytest.mark.parametrize(
    ("family", "names", "flags", "message"),
    [
        ("qwen3_moe", ("all-linear",), {"dora": True}, "--use_dora with --target_parameters down_proj gate.weight"),
        ("qwen3_moe", ("gate",), {"dropout": 0.1}, "--lora_dropout with --target_parameters gate.weight"),
        ("qwen2_moe", ("shared_expert_gate",), {"init": "olora"}, "--init_weights olora with --target_modules shared"),
        ("llama", ("q_proj",), {"dora": True, "dropout": 0.1}, "--use_dora with --lora_dropout is not computed yet"),
        ("llama", ("q_proj",), {"dora": True, "init": "pissa"}, "--use_dora with --init_weights pissa"),
    ],
)
def test_combinations_that_do_not_exist(family: str, names: tuple[str, ...], flags: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match=message):
        LoraConfig.for_table(table(family), rank=4, alpha=8, target_modules=names, **flags)
