"""Every refusal names flag, numbers and a value; here that value is read out of the message and must be accepted."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mswift.config.train import PtConfig, SftConfig
from mswift.converters.spec import DeltaSpec, LayerSpec, ModelSpec, MoeSpec, RopeSpec
from mswift.errors import ConfigError, LayoutError
from mswift.refusals import check_train, train_dtype, train_refusals
from mswift.refusals.flags import check_schedule

SPEC = ModelSpec(
    model_type="llama",
    num_layers=6,
    hidden_size=64,
    num_attention_heads=8,
    num_kv_heads=4,
    head_dim=8,
    ffn_hidden_size=96,
    vocab_size=1003,
    max_position_embeddings=512,
    norm_eps=1e-5,
    rope=RopeSpec(theta=10_000.0),
    tied_embeddings=False,
)
FINE = SftConfig(model="m", dataset=("a.jsonl",), train_iters=10)


def _refused(config: SftConfig, world_size: int = 1, spec: ModelSpec = SPEC) -> str:
    with pytest.raises(ConfigError) as refusal:
        check_train(config, spec, world_size)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def _remedies(message: str, flag: str) -> list[str]:
    """Values that a message proposes for `flag`: "use --flag 3 or 4", "it can be 1, 2"."""
    found = re.search(rf"use --{flag} (.+?)(?: or less| or more| or --|, |$)", message)
    found = found or re.search(r"can be ([\d., ]+)$", message)
    assert found is not None, message
    return re.split(r", | or ", found[1])


def test_a_fitting_run_has_a_layout() -> None:
    config = dataclasses.replace(FINE, tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    dims = check_train(config, SPEC, 12)
    assert (dims.tp, dims.pp, dims.dp) == (2, 3, 2)
    assert train_refusals(config, SPEC, 12) == []


CASES: list[tuple[dict[str, Any], int, str, list[str]]] = [
    # change of the fitting run, ranks, the flag whose remedy is run, words of the message
    (dict(tensor_model_parallel_size=8), 8, "tensor_model_parallel_size", ["8", "4 key/value heads"]),
    (dict(tensor_model_parallel_size=3), 3, "tensor_model_parallel_size", ["3", "4 key/value heads"]),
    (dict(pipeline_model_parallel_size=4), 4, "pipeline_model_parallel_size", ["4", "6 layers"]),
    (dict(pipeline_model_parallel_size=12), 12, "pipeline_model_parallel_size", ["12", "more stages", "6 layers"]),
    (dict(global_batch_size=10), 4, "global_batch_size", ["10", "data-parallel size 4"]),
    (dict(global_batch_size=3, micro_batch_size=2), 2, "global_batch_size", ["--micro_batch_size 2", "= 4"]),
    (
        dict(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2),
        2,
        "num_layers_per_virtual_pipeline_stage",
        ["3 layers of each of the 2 stages"],
    ),
    (
        dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3, global_batch_size=3),
        2,
        "global_batch_size",
        ["3 microbatches", "2 interleaved stages"],
    ),
    (
        dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=4),
        1,
        "recompute_num_layers",
        ["chunk of 6 layers"],
    ),
    (dict(lr_warmup_iters=10), 1, "lr_warmup_iters", ["10 steps of the run"]),
    (dict(lr_warmup_iters=8, lr_decay_iters=5), 1, "lr_warmup_iters", ["8", "--lr_decay_iters 5"]),
    (
        dict(lr_decay_style="WSD", lr_wsd_decay_iters=9, lr_warmup_iters=4),
        1,
        "lr_wsd_decay_iters",
        ["9", "4", "10 steps"],
    ),
    (dict(lr_decay_style="WSD", lr_warmup_iters=96, train_iters=100), 1, "lr_wsd_decay_iters", ["96", "100 steps"]),
    (dict(lr_wsd_decay_style="cosine"), 1, "lr_decay_style", ["--lr_wsd_decay_style cosine", "WSD"]),
    (dict(lr_decay_style="constant", min_lr=1e-6), 1, "min_lr", ["1e-06", "constant"]),
    (dict(lr_decay_style="constant", lr_decay_iters=5), 1, "lr_decay_style", ["--lr_decay_iters 5", "constant"]),
    (dict(min_lr=1.0), 1, "min_lr", ["1.0", "--lr 1e-05"]),
    (dict(micro_batch_size=0), 1, "micro_batch_size", ["0", "at least 1"]),
    (dict(train_iters=-1), 1, "train_iters", ["-1"]),
    (dict(save_steps=0), 1, "save_steps", ["0"]),
    (dict(save_hf_steps=0), 1, "save_hf_steps", ["0"]),
    (dict(distributed_timeout_minutes=0.0), 1, "distributed_timeout_minutes", ["0.0"]),
    (dict(clip_grad=-1.0), 1, "clip_grad", ["-1.0"]),
    (dict(lr=float("nan")), 1, "lr", ["nan"]),
    (dict(adam_beta2=1.0), 1, "adam_beta2", ["1.0"]),
    (dict(adam_eps=0.0), 1, "adam_eps", ["0.0"]),
    (dict(backend="fsdp", fsdp_shard_size=3), 4, "fsdp_shard_size", ["3", "4 ranks"]),
    (dict(backend="fsdp", tensor_model_parallel_size=2), 2, "backend", ["--tensor_model_parallel_size 2", "megatron"]),
    (dict(backend="ddp", mcore={"bucket_size": 1}), 2, "backend", ["--mcore.bucket_size", "ddp"]),
    (dict(backend="ddp", fsdp_shard_size=2), 2, "backend", ["--fsdp_shard_size 2", "cuts no parameters"]),
    (dict(fsdp_shard_size=2), 2, "backend", ["--fsdp_shard_size belongs to"]),
    (dict(tuner_type="oft"), 2, "backend", ["--tuner_type oft", "transformers' model", "--backend fsdp"]),
    (dict(train_iters=None), 1, "train_iters", ["length of the run is missing"]),
    (dict(train_iters=None, num_train_epochs=0.0), 1, "num_train_epochs", ["0.0"]),
    (dict(lora_rank=16), 1, "tuner_type", ["--lora_rank 16", "full"]),
    (dict(modules_to_save=("lm_head",)), 1, "tuner_type", ["--modules_to_save lm_head"]),
    (dict(lr_wsd_decay_iters=3), 1, "lr_decay_style", ["3", "cosine"]),
    (dict(context_parallel_size=2, cp_comm_type="a2a+p2p"), 2, "cp_comm_type", ["without", "a2a+p2p"]),
    (
        dict(context_parallel_size=4, cp_comm_type="a2a", tensor_model_parallel_size=2),
        8,
        "cp_comm_type",
        ["a2a exchanges heads between 4 ranks", "4 key/value heads", "--tensor_model_parallel_size 2 leaves 2"],
    ),
    (dict(sequence_parallel=True), 2, "sequence_parallel", ["--tensor_model_parallel_size is 1"]),
]
_KINDS: dict[str, Any] = {"false": False}


@pytest.mark.parametrize(("change", "world_size", "flag", "words"), CASES, ids=[str(case[0]) for case in CASES])
def test_the_remedy_of_a_message_works(change: dict[str, Any], world_size: int, flag: str, words: list[str]) -> None:
    config = dataclasses.replace(FINE, **change)
    message = _refused(config, world_size)
    assert all(word in message for word in words), message
    given_flags = [f"--{name}" for name in change if f"--{name}" in message]
    assert given_flags or "missing" in message
    for text in _remedies(message, flag):
        kind = type(getattr(FINE, flag)) if getattr(FINE, flag) is not None else int
        value = _KINDS[text] if text in _KINDS else kind(text)
        mended = dataclasses.replace(config, **{flag: value})
        size = value if flag.endswith("parallel_size") else world_size
        check_train(mended, SPEC, size)


@pytest.mark.parametrize(
    ("change", "mended", "message"),
    [
        (dict(num_train_epochs=1.0), dict(num_train_epochs=None), "--train_iters 10 and --num_train_epochs 1.0"),
        (dict(dataset=()), dict(dataset=("f",)), "--dataset is required"),
        (
            dict(dataset=("a", "b"), dataset_weights=(1.0,)),
            dict(dataset_weights=(1.0, 2.0)),
            "has 1 numbers for 2 items",
        ),
        (dict(dataset_weights=(0.0,)), dict(dataset_weights=(0.1,)), "--dataset_weights 0: a weight must be above 0"),
        (
            dict(split_dataset_ratio=1.0),
            dict(split_dataset_ratio=0.01),
            "--split_dataset_ratio 1 must be from 0",
        ),
        (dict(split_dataset_ratio=0.1, val_dataset=("f",)), dict(val_dataset=()), "--val_dataset: give one of them"),
        (
            dict(eval_steps=5),
            dict(split_dataset_ratio=0.01),
            "add --val_dataset FILE or --split_dataset_ratio",
        ),
        (
            dict(packing_strategy="sequential"),
            dict(packing=True),
            "--packing_strategy sequential has no effect without --packing: add --packing",
        ),
        (dict(packing_length=8192), dict(packing=True), "--packing_length 8192 has no effect without --packing"),
        (
            dict(packing=True, packing_length=1024),
            dict(packing_length=2048),
            "--packing_length 1024 is below --max_length 2048, and no sample is cut to be packed: use --packing_length "
            "2048 or more",
        ),
        (dict(packing=True, packing_length=0), dict(packing_length=None), "--packing_length 0 must be at least 1"),
        (
            dict(packing=True, packing_strategy="concat-and-split"),
            dict(packing_strategy="sequential"),
            "--packing_strategy concat-and-split cuts samples where a row ends, which is for pt: use",
        ),
        (dict(columns="a=b"), dict(columns='{"a": "b"}'), "--columns a=b: it takes a JSON object of names"),
        (dict(columns='{"a": "q", "b": "q"}'), dict(columns='{"a": "q"}'), "two columns cannot have one name"),
        (dict(eval_steps=5), dict(val_dataset=("f",)), "--eval_steps 5 has nothing to evaluate: add --val_dataset"),
        (dict(world_size=4), dict(world_size=None, nproc_per_node=4), "--nproc_per_node 4"),
        (dict(dry_run=True, world_size=4, nproc_per_node=2), dict(nproc_per_node=None), "--world_size 4"),
        (dict(tuner_type="lora", adapters=("a", "b")), dict(adapters=("a",)), "names 2 adapters"),
        (dict(tuner_type="lora", quant_method="bnb"), dict(quant_bits=4), "--quant_bits 4"),
        (
            dict(backend="fsdp", tuner_type="lora", quant_method="bnb", quant_bits=4, fsdp_cpu_offload=True),
            dict(fsdp_cpu_offload=False),
            "--quant_method bnb with --fsdp_cpu_offload",
        ),
        (dict(tuner_type="lora", quant_bits=4), dict(quant_method="bnb"), "--quant_method bnb"),
        (
            dict(tuner_type="lora", quant_method="gptq", bnb_4bit_quant_type="fp4"),
            dict(bnb_4bit_quant_type="nf4"),
            "--bnb_4bit_quant_type fp4 has no effect with --quant_method gptq",
        ),
        (
            dict(tuner_type="lora", quant_method="awq", use_dora=True),
            dict(use_dora=False),
            "--quant_method awq with DoRA",
        ),
        (dict(quant_method="awq"), dict(tuner_type="lora"), "--quant_method awq has no effect with --tuner_type full"),
        (dict(tuner_type="lora", quant_method="bnb", quant_bits=4, use_dora=True), dict(use_dora=False), "--use_dora"),
        (
            dict(tuner_type="lora", quant_method="bnb", quant_bits=4, init_weights="pissa"),
            dict(init_weights="true"),
            "--init_weights pissa",
        ),
        (
            dict(load_weights_only=True),
            dict(resume_from_checkpoint="r"),
            "add --resume_from_checkpoint RUN/checkpoint-N",
        ),
        (
            dict(tuner_type="lora", adapters=("a",), load_weights_only=True, resume_from_checkpoint="r"),
            dict(adapters=()),
            "--adapters a and --load_weights_only both bring an adapter",
        ),
    ],
    ids=str,
)
def test_contradictions(change: dict[str, Any], mended: dict[str, Any], message: str) -> None:
    config = dataclasses.replace(FINE, **change)
    assert message in _refused(config)
    check_train(dataclasses.replace(config, **mended), SPEC, 1)


@pytest.mark.parametrize("sizes", [(2, 3), (8, 1), (4,)])
def test_groups_inside_groups_make_up_the_group(sizes: tuple[int, ...]) -> None:
    config = dataclasses.replace(
        FINE, context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=sizes
    )
    message = _refused(config, 4)
    assert f"--hierarchical_context_parallel_sizes {' '.join(map(str, sizes))} " in message
    assert "--context_parallel_size 4" in message
    for text in _remedies(message, "hierarchical_context_parallel_sizes"):
        inner, outer = map(int, text.split())
        check_train(dataclasses.replace(config, hierarchical_context_parallel_sizes=(inner, outer)), SPEC, 4)


def test_recurrent_layers_do_not_share_sequences() -> None:
    delta = DeltaSpec(num_key_heads=4, num_value_heads=4, key_head_dim=8, value_head_dim=8, conv_kernel=4)
    spec = dataclasses.replace(SPEC, delta=delta, layers=(LayerSpec(mixer="delta"), *[LayerSpec()] * 5))
    config = dataclasses.replace(FINE, context_parallel_size=2)
    message = _refused(config, 2, spec)
    assert "--context_parallel_size 2: model_type 'llama' has delta layers" in message
    for text in _remedies(message, "context_parallel_size"):
        check_train(dataclasses.replace(config, context_parallel_size=int(text)), spec, 2)


def test_recurrent_layers_do_not_keep_samples_of_a_row_apart() -> None:
    delta = DeltaSpec(num_key_heads=4, num_value_heads=4, key_head_dim=8, value_head_dim=8, conv_kernel=4)
    spec = dataclasses.replace(SPEC, delta=delta, layers=(LayerSpec(mixer="delta"), *[LayerSpec()] * 5))
    message = _refused(dataclasses.replace(FINE, packing=True), 1, spec)
    assert message.startswith("--packing: model_type 'llama' has delta layers")
    check_train(FINE, spec, 1)
    check_train(dataclasses.replace(FINE, packing=True), SPEC, 1)


def test_rows_of_cut_documents_have_one_length() -> None:
    config = PtConfig(model="m", dataset=("a.txt",), train_iters=10, packing=True, packing_strategy="concat-and-split")
    with pytest.raises(
        ConfigError, match="--packing_length 4096: rows of .* have --max_length 2048 positions: leave it"
    ):
        check_train(dataclasses.replace(config, packing_length=4096), SPEC, 1)
    check_train(config, SPEC, 1)
    check_train(dataclasses.replace(config, packing_strategy="bestfit", packing_length=4096), SPEC, 1)


def test_float16_is_not_trained_in() -> None:
    with pytest.raises(ConfigError, match="holds F16 .* use --torch_dtype bfloat16 or float32"):
        train_dtype(FINE, "F16")
    assert train_dtype(dataclasses.replace(FINE, torch_dtype="bfloat16"), "F16") == "BF16"
    assert train_dtype(dataclasses.replace(FINE, torch_dtype="float32"), "BF16") == "F32"
    assert train_dtype(FINE, "BF16") == "BF16"


def test_every_mistake_is_listed() -> None:
    config = dataclasses.replace(FINE, train_iters=None, save_steps=0, tensor_model_parallel_size=8)
    texts = [str(refusal) for refusal in train_refusals(config, SPEC, 8)]
    assert len(texts) == 3
    assert [flag in text for flag, text in zip(["save_steps", "length", "tensor"], texts, strict=True)] == [True] * 3


@pytest.mark.parametrize(("change", "flag"), [({"lr": -1.0}, "--lr -1.0"), ({"train_iters": -1}, "--train_iters -1")])
def test_what_follows_from_a_mistake_is_not_another_one(change: dict[str, Any], flag: str) -> None:
    (text,) = [str(refusal) for refusal in train_refusals(dataclasses.replace(FINE, **change), SPEC, 1)]
    assert text.startswith(flag)


def test_a_schedule_is_checked_again_when_epochs_become_steps() -> None:
    config = dataclasses.replace(FINE, train_iters=None, num_train_epochs=1.0, lr_warmup_iters=20)
    check_train(config, SPEC, 1)
    check_schedule(config, 21)
    with pytest.raises(ConfigError, match="use --lr_warmup_iters 19"):
        check_schedule(config, 20)


@given(st.integers(1, 16), st.integers(1, 12), st.integers(1, 16), st.integers(1, 40), st.integers(1, 4))
def test_what_is_accepted_cuts_no_unit_and_what_is_refused_names_a_number(
    tp: int, pp: int, world_size: int, global_batch_size: int, micro_batch_size: int
) -> None:
    config = dataclasses.replace(
        FINE,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    fits = not (SPEC.num_kv_heads % tp or SPEC.num_layers % pp or world_size % (tp * pp))
    fits = fits and global_batch_size % (micro_batch_size * max(world_size // (tp * pp), 1)) == 0
    if fits:
        assert check_train(config, SPEC, world_size).dp == world_size // (tp * pp)
    else:
        with pytest.raises(LayoutError, match=r"(use|can be) .*\d"):
            check_train(config, SPEC, world_size)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 6), st.integers(1, 64))
def test_tensor_parallel_sizes_that_a_message_names_all_work(
    kv_heads: int, groups: int, ffn_units: int, tp: int
) -> None:
    spec = dataclasses.replace(
        SPEC, num_kv_heads=kv_heads, num_attention_heads=kv_heads * groups, ffn_hidden_size=8 * ffn_units
    )
    config = dataclasses.replace(FINE, tensor_model_parallel_size=tp)
    assume(kv_heads % tp or (8 * ffn_units) % tp)
    for size in _remedies(_refused(config, tp, spec), "tensor_model_parallel_size"):
        check_train(dataclasses.replace(config, tensor_model_parallel_size=int(size)), spec, int(size))


_MOE = dataclasses.replace(SPEC, moe=MoeSpec(num_experts=4, top_k=2, ffn_hidden_size=32))


_QUANTIZED = {"backend": "fsdp", "optimizer": "galore", "galore_quantization": True}


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        (
            {"optimizer": "lion"},
            SPEC,
            "is not for --backend megatron: use adam or sgd, or --backend fsdp",
        ),
        ({"optimizer": "muon", "backend": "fsdp", "tuner_type": "lora"}, SPEC, "not for adapters: use adam, lion"),
        ({"optimizer": "muon", "backend": "ddp"}, _MOE, "experts of a layer in one tensor"),
        (
            {"backend": "fsdp", "torch_compile": True, "recompute_granularity": "selective"},
            SPEC,
            "which --torch_compile joins: use full",
        ),
        (
            {"backend": "fsdp", "recompute_granularity": "selective"},
            dataclasses.replace(_MOE, model_type="gpt_oss"),
            "gpt_oss writes into products of its experts, which are to be kept: use full",
        ),
        ({"backend": "ddp", "use_liger_kernel": True, "torch_compile": True}, SPEC, "kernels of both: leave one out"),
        ({"backend": "ddp", "use_liger_kernel": True}, SPEC, "needs liger-kernel, which is not installed"),
        ({"use_liger_kernel": True}, SPEC, "--use_liger_kernel belongs to --backend fsdp"),
        ({"fsdp_cpu_offload": True}, SPEC, "--fsdp_cpu_offload belongs to --backend fsdp"),
        ({"fsdp_cpu_offload": True, "backend": "ddp"}, SPEC, "keeps its parameters where it computes: leave it out"),
        ({"backend": "fsdp", "muon_momentum": 0.9}, SPEC, "--muon_momentum belongs to --optimizer muon: leave it out"),
        ({"backend": "fsdp", "galore_rank": 4}, SPEC, "--galore_rank belongs to --optimizer galore and apollo"),
        ({"sgd_momentum": 0.5}, SPEC, "--sgd_momentum belongs to --optimizer sgd: leave it out"),
        ({"optimizer": "sgd", "adam_beta1": 0.8}, SPEC, "--adam_beta1 belongs to --optimizer adam, adamw_8bit, muon"),
        ({"optimizer": "lion", "backend": "ddp", "adam_eps": 1e-6}, SPEC, "--adam_eps belongs to --optimizer adam"),
        (
            {"backend": "fsdp", "trainable_parameters": ("model.layers.0.",)},
            SPEC,
            "--trainable_parameters model.layers.0.: nothing is frozen, so that all of the model is trained: add "
            "--freeze_parameters_regex .",
        ),
        ({"backend": "fsdp", "optimizer": "adamw_8bit"}, SPEC, "needs bitsandbytes, which is not installed"),
        ({"backend": "fsdp", "optimizer": "galore"}, SPEC, "pip install 'mswift"),
        (_QUANTIZED, SPEC, "--optimizer galore needs bitsandbytes, which is not installed"),
        ({"backend": "fsdp", "galore_quantization": True}, SPEC, "--galore_quantization belongs to --optimizer galore"),
        ({"backend": "fsdp", "optimizer": "galore", "galore_proj_bits": 8}, SPEC, "to --galore_quantization true"),
        ({**_QUANTIZED, "galore_proj_group_size": 3}, SPEC, "--galore_proj_group_size 3: an even number"),
        ({**_QUANTIZED, "galore_queue_size": 0}, SPEC, "--galore_queue_size 0: at least 1"),
        ({**_QUANTIZED, "galore_cos_threshold": -1.0}, SPEC, "--galore_cos_threshold -1: at least 0"),
    ],
)
def test_optimizers_that_would_be_wrong_are_refused(
    changes: dict[str, Any], spec: ModelSpec, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(FINE, **changes)
    monkeypatch.setattr("mswift.refusals.backend.find_spec", lambda _: None)
    assert words in _refused(config, 1, spec)
    monkeypatch.setattr("mswift.refusals.backend.find_spec", lambda name: name)
    if "installed" in words or "pip" in words:
        assert train_refusals(config, spec, 1) == []


@pytest.mark.parametrize("changes", [{"context_parallel_size": 2}, {"packing": True}, {"max_length": 600}])
def test_frequencies_that_depend_on_a_rank_s_rows_are_refused(changes: dict[str, Any]) -> None:
    rope = RopeSpec(theta=10_000.0, kind="dynamic", original_max_position_embeddings=256)
    spec = dataclasses.replace(SPEC, rope=rope, max_position_embeddings=1024)
    config = dataclasses.replace(FINE, backend="fsdp", **changes)
    if "max_length" not in changes:
        config = dataclasses.replace(config, max_length=128)
    assert "rope type 'dynamic'" in _refused(config, 2, spec)
    assert train_refusals(dataclasses.replace(FINE, backend="fsdp", max_length=128), spec, 2) == []


@pytest.mark.parametrize(
    ("size", "kind", "levels"), [(1, "p2p", ()), (2, "a2a", ()), (4, "a2a", ()), (8, "a2a+p2p", (4, 2)), (3, "p2p", ())]
)
def test_ranks_that_share_sequences_exchange_heads_as_far_as_there_are(size: int, kind: str, levels: Any) -> None:
    """The model has 4 KV heads."""
    from mswift.refusals.backend import with_shared_sequences

    config = with_shared_sequences(dataclasses.replace(FINE, sequence_parallel_size=size), SPEC)
    found = (config.context_parallel_size, config.cp_comm_type, config.hierarchical_context_parallel_sizes)
    assert found == (size, kind, levels)
    both = dataclasses.replace(FINE, sequence_parallel_size=2, context_parallel_size=2)
    assert "--sequence_parallel_size 2 stands for --context_parallel_size too" in _refused(both, 2)
