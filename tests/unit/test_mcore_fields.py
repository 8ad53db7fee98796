"""--mcore.FIELD: names, values and refusals, from the command line, in recipes and in saved configurations."""

import re
from pathlib import Path
from typing import Any

import pytest

from mswift.cli.options import parse
from mswift.config import mcore, mcore_fields
from mswift.config.loader import dump, load, to_arguments
from mswift.config.train import PtConfig
from mswift.errors import ConfigError
from mswift.refusals.flags import flag_refusals

MODEL = ["--model", "m"]
CP_FLAGS = {"context_parallel_size", "cp_comm_type"}


def groups() -> list[set[str]]:
    names = ("PASSED", "NEEDS_GPU", "FLAGS", "FROM_THE_MODEL", "CHANGES_THE_FUNCTION", "NEEDS_TRANSFORMER_ENGINE")
    return [set(getattr(mcore_fields, name)) for name in (*names, "WITHOUT_EFFECT")]


def test_every_field_has_exactly_one_group() -> None:
    known = set(mcore.fields())
    assert len(known) > 300
    assert set().union(*groups()) == known
    assert sum(map(len, groups())) == len(known)


def test_the_flags_that_are_named_exist() -> None:
    assert set(mcore_fields.FLAGS.values()) <= set(PtConfig.__dataclass_fields__) | CP_FLAGS


def test_values_are_typed_and_come_back_from_every_form(tmp_path: Path) -> None:
    argv = ["--mcore.bucket_size", "1000", "--mcore.check-for-nan-in-grad", "--mcore.config_logger_dir=x y"]
    config = parse(PtConfig, [*MODEL, *argv, "--mcore.cuda_graph_scope", "attn", "mlp"])
    scope = ["attn", "mlp"]
    wanted = {"bucket_size": 1000, "check_for_nan_in_grad": True, "config_logger_dir": "x y", "cuda_graph_scope": scope}
    assert config.mcore == wanted
    assert parse(PtConfig, to_arguments(config)) == config
    assert load(PtConfig, dump(config)) == config
    (tmp_path / "saved.yaml").write_text(dump(config))
    assert parse(PtConfig, [str(tmp_path / "saved.yaml")]) == config
    again = parse(PtConfig, [str(tmp_path / "saved.yaml"), "--mcore.bucket_size", "none"])
    assert again.mcore == wanted | {"bucket_size": None}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mcore.bucket_sizes", "1"], "no field 'bucket_sizes'; did you mean --mcore.bucket_size?"),
        (["--mcore.bucket_size", "many"], "--mcore.bucket_size many: it takes a whole number or none"),
        (["--mcore.bucket_size", "1.5"], "it takes a whole number or none"),
        (["--mcore.bucket_size", "1", "2"], "unexpected|neither a recipe"),
        (["--mcore.deterministic_mode", "perhaps"], "it takes true or false"),
        (["--mcore.moe_token_dispatcher_type", "post"], "allgather or alltoall or flex"),
        (["--mcore.tensor_model_parallel_size", "2"], "--tensor_model_parallel_size says: use that flag"),
        (["--mcore.hidden_size", "2"], "follows from config.json of --model"),
        (["--mcore.attention_dropout", "0.1"], "would change what is computed"),
        (["--mcore.fp8", "hybrid"], "needs Transformer Engine"),
        (["--mcore.init_method_std", "0.1"], "would have no effect: weights are loaded"),
        (["--mcore", "bucket_size"], "one field a flag: --mcore.FIELD VALUE"),
    ],
)
def test_a_field_that_is_wrong_is_one_clear_error(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(PtConfig, [*MODEL, *argv])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mcore: 5", "line 1: mcore must be a mapping"),
        ("mcore: {bucket_size: {a: 1}}", "line 1: mcore.bucket_size must be one value"),
        ("mcore: {buckets: 1}", "no field 'buckets'"),
    ],
)
def test_a_recipe_is_read_as_strictly(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        parse(PtConfig, [str(tmp_path / "r.yaml"), *MODEL])


def refusals(**values: Any) -> str:
    return "\n".join(map(str, flag_refusals(PtConfig(model="m", dataset=("d",), train_iters=1, **values))))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mcore": {"cuda_graph_impl": "local"}, "device": "cpu"}, "--mcore.cuda_graph_impl local needs a GPU"),
        ({"mcore": {"deallocate_pipeline_outputs": True}, "device": "cpu"}, "pipeline_outputs True needs a GPU"),
        ({"mcore": {"moe_token_dispatcher_type": "flex"}, "device": "cpu"}, "needs a GPU"),
        ({"gradient_accumulation_fusion": True, "device": "cpu"}, "--gradient_accumulation_fusion is a CUDA kernel"),
        ({"use_distributed_optimizer": False}, "--use_distributed_optimizer false"),
        ({"overlap_param_gather": True}, "add --overlap_grad_reduce"),
        ({"recompute_method": "uniform"}, "--recompute_method has no effect without .* --recompute_granularity full"),
        ({"recompute_modules": ("mlp",)}, "add --recompute_granularity selective"),
        ({"recompute_granularity": "full"}, "use --recompute_method uniform --recompute_num_layers 1"),
        (
            {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1,
             "recompute_modules": ("mlp",)},
            "--recompute_modules belongs to",
        ),
        ({"recompute_granularity": "selective", "recompute_num_layers": 2}, "--recompute_num_layers belongs to"),
        ({"recompute_granularity": "full", "recompute_num_layers": 0}, "--recompute_num_layers 0 must be at least 1"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    assert refusals() == ""
    assert re.search(words, refusals(**values))
