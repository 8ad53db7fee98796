"""X-LoRA in the transformers engine: tokens and scores of a batch are those of PEFT's model, which has no cache."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mswift.errors import CheckpointError, ConfigError
from mswift.infer.loading import load_adapters, load_model, load_tokenizer
from mswift.infer.request import BASE_MODEL, Request, Sampling
from mswift.infer.transformers_engine import TransformersEngine
from mswift.tuners.xlora import CLASSIFIER, xlora_config
from mswift.tuners.xlora_files import directory_configs
from mswift.tuners.xlora_modules import first_classifier
from tests.support.adapters import table_of
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.xlora import CASES, load_xlora, make_loras, mixed_of, peft_model, save_whole

PROMPTS = ([5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [30])
NEW_TOKENS = 6
NAMES = ("deep", "trained")


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def home(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, in `model`, and X-LoRAs by the name of their case; one as PEFT saves it, in `broken`."""
    folder: Path = tmp_path_factory.mktemp("infer")
    tiny_tokenizer(folder / "model")
    window = {"sliding_window": 7} if request.param == "mistral" else {}
    make_loras(tiny_model(folder / "model", request.param, vocab_size=259, **window), folder)
    for name in NAMES:
        model = peft_model(folder, mixed_of(folder, CASES[name]))
        with torch.no_grad():
            for parameter in getattr(model.base_model, CLASSIFIER).parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        save_whole(model, folder / name)
    model.save_pretrained(folder / "broken")
    return folder


def engine_of(home: Path, adapters: dict[str, Path], dtype: str = "float32") -> TransformersEngine:
    model = load_model(home / "model", dtype, torch.device("cpu"))
    return TransformersEngine(model, load_tokenizer(home / "model"), adapters)


def peft_answers(home: Path, name: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
    """(tokens of PEFT's `generate`, their log-probabilities in one pass); None: of the model alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)
    model.config.use_cache = False
    if name is not None:
        model = PeftModel.from_pretrained(model, str(home / name))
    ids = torch.tensor([prompt])
    limits = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    whole = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)
    with torch.no_grad():
        logprobs = model(whole).logits[0].log_softmax(-1)
    tokens = whole[0, len(prompt) :].tolist()
    return tokens, [float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_answers_as_peft_does(home: Path, name: str) -> None:
    engine = engine_of(home, {name: home / name})
    asked = [(adapter, prompt) for adapter in (name, BASE_MODEL) for prompt in PROMPTS]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True)
    requests = [Request(prompt_ids=tuple(prompt), adapter=a, sampling=sampling) for a, prompt in asked]
    for (adapter, prompt), completion in zip(asked, engine.generate(requests), strict=True):
        tokens, logprobs = peft_answers(home, None if adapter == BASE_MODEL else name, prompt)
        assert list(completion.token_ids) == tokens
        assert completion.logprobs is not None
        assert [entry.logprob for entry in completion.logprobs] == pytest.approx(logprobs, abs=2e-4)
        (score,) = engine.score([(prompt, tokens)], adapter)
        assert [entry.logprob for entry in score.tokens] == pytest.approx(logprobs, abs=2e-4)
    engine.close()


def test_what_peft_loses_is_named(home: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks .*classifier.layers.0.bias .* leaves out layers of the classif"):
        engine_of(home, {"broken": home / "broken"})
    with pytest.raises(ConfigError, match="give it alone"):
        engine_of(home, {"deep": home / "deep", "lora": home / "lora-0"})


def test_eleven_loras_keep_their_order_in_a_directory_for_peft(home: Path, tmp_path: Path) -> None:
    """Names are sorted where PEFT writes them: 0 1 10 2."""
    paths = [home / f"lora-{number % 3}" for number in range(11)]
    table = table_of(home / "model")
    config = xlora_config(table, {"layerwise_scalings": True}, [str(path) for path in paths])
    for number, path in enumerate(paths):
        shutil.copytree(path, tmp_path / str(number))
    for name, text in directory_configs(config.text(table, (), None), tmp_path).items():
        (tmp_path / name).write_bytes(text)
    save_file(dict(first_classifier(table, config)), tmp_path / "adapter_model.safetensors")
    ids = torch.tensor([PROMPTS[1]])
    ours: Any = load_adapters(load_model(home / "model", "float32", torch.device("cpu")), {"mixed": tmp_path})
    with torch.no_grad():
        difference = (ours(ids).logits - load_xlora(home, tmp_path)(ids).logits).abs().max()
    assert difference < 2e-5


def test_in_bfloat16_the_mixture_stays_fp32(home: Path) -> None:
    engine = engine_of(home, {"deep": home / "deep"}, "bfloat16")
    dtypes = {"lora" in name: parameter.dtype for name, parameter in engine.model.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    sampling = Sampling(max_new_tokens=3, ignore_eos=True)
    (completion,) = engine.generate([Request(prompt_ids=(5, 6), adapter="deep", sampling=sampling)])
    assert len(completion.token_ids) == 3


def test_scales_of_other_rows_are_not_taken(home: Path) -> None:
    """As a model that computes the tokens of all rows as one would take them."""
    model: Any = load_adapters(load_model(home / "model", "float32", torch.device("cpu")), {"deep": home / "deep"})
    with torch.no_grad():
        model(input_ids=torch.zeros(2, 5, dtype=torch.long))
        with pytest.raises(ConfigError, match=r"X-LoRA of model.layers.0.mlp.down_proj: its inputs are \[10, 96\] .*"):
            model.model.layers[0].mlp.down_proj(torch.zeros(10, 96))
