"""Adapters in the transformers engine, side by side: prompt learning and methods of several kinds, each as PEFT's.

The oracle is a PeftModel that is asked for every token anew, without a cache.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mswift.errors import DataError
from mswift.infer.loading import load_model, load_tokenizer
from mswift.infer.request import BASE_MODEL, Request, Sampling
from mswift.infer.transformers_engine import TransformersEngine
from mswift.tuners.methods import METHODS
from tests.support.methods import method_of, random_peft
from tests.support.prompts import Behind, peft_model, prompt_of
from tests.support.tiny import tiny_model, tiny_tokenizer

KINDS = ("prompt", "ptuning", "prefix", "prefix projected")
PROMPTS = ([5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [30])
NEW_TOKENS = 6


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def home(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, in `model`, and an adapter of each kind by its name, all made by PEFT; a LoRA."""
    folder: Path = tmp_path_factory.mktemp("infer")
    tiny_tokenizer(folder / "model")
    window = {"sliding_window": 7} if request.param == "mistral" else {}
    tiny_model(folder / "model", request.param, vocab_size=259, **window)
    for kind in KINDS:
        model = peft_model(folder, prompt_of(folder, kind))
        with torch.no_grad():
            for parameter in model.prompt_encoder.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.5)
        model.save_pretrained(folder / kind.replace(" ", "-"))
    return folder


def greedy(home: Path, adapter: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """(tokens, their log-probabilities) of a model that computes the whole sequence for each."""
    from peft import PeftModel

    model: Any = AutoModelForCausalLM.from_pretrained(home / "model").eval()
    if adapter:
        model = PeftModel.from_pretrained(model, str(home / adapter)).eval()
    tokens, logprobs = list(prompt), []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            last = Behind(model)(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
            tokens.append(int(last.argmax()))
            logprobs.append(float(last.max()))
    return tokens[len(prompt) :], logprobs


def engine_of(home: Path, *adapters: str, **options: Any) -> TransformersEngine:
    model, tokenizer = load_model(home / "model", None, torch.device("cpu")), load_tokenizer(home / "model")
    return TransformersEngine(model, tokenizer, {name: home / name for name in adapters}, **options)


def test_answers_and_scores_side_by_side_are_peft_s(home: Path) -> None:
    names = [kind.replace(" ", "-") for kind in KINDS]
    engine = engine_of(home, *names)
    asked = [(adapter, prompt) for adapter in (BASE_MODEL, *names) for prompt in PROMPTS]
    requests = [
        Request(
            prompt_ids=tuple(prompt),
            adapter=adapter,
            sampling=Sampling(max_new_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True),
        )
        for adapter, prompt in asked
    ]
    for (adapter, prompt), completion in zip(asked, engine.generate(requests), strict=True):
        tokens, logprobs = greedy(home, adapter, prompt)
        assert list(completion.token_ids) == tokens, adapter
        assert completion.logprobs is not None
        assert [entry.logprob for entry in completion.logprobs] == pytest.approx(logprobs, abs=2e-4), adapter
        (score,) = engine.score([(prompt, tokens)], adapter)
        assert [entry.logprob for entry in score.tokens] == pytest.approx(logprobs, abs=2e-4), adapter
    assert len({completion.token_ids for completion in engine.generate(requests[::3])}) >= 3


def test_a_prompt_without_room_behind_virtual_tokens_is_refused_with_the_numbers(home: Path) -> None:
    engine = engine_of(home, "prompt", max_length=12)
    engine.check([5] * 6, "prompt")
    with pytest.raises(DataError, match=r"7 tokens behind the adapter's 5 virtual .* is 12; shorten it to 6 or less"):
        engine.check([5] * 7, "prompt")
    engine.check([5] * 11)
    with pytest.raises(DataError, match=r"a prompt of 12 tokens leaves no room .* is 12; shorten it to 11 or less"):
        engine.check([5] * 12)
    engine = engine_of(home, "prompt", max_length=5)
    with pytest.raises(DataError, match="no prompt fits: ask without this adapter"):
        engine.check([5], "prompt")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, in `model`, an adapter of several methods of PEFT's, a prompt, and two LoRAs."""
    folder = tmp_path_factory.mktemp("mixed")
    tiny_tokenizer(folder / "model")
    tiny_model(folder / "model", "qwen3", vocab_size=259)
    for method in METHODS:
        random_peft(folder, method_of(folder, method), 0.3)
    for number, name in enumerate(("first", "second")):
        settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(number)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), settings)
        peft.save_pretrained(str(folder / name))
    peft_model(folder, prompt_of(folder, "prompt")).save_pretrained(folder / "prompt")
    return folder


def test_adapters_of_several_methods_answer_side_by_side(mixed: Path) -> None:
    names = ["first", *METHODS, "prompt", "second"]
    engine = engine_of(mixed, *names)
    asked = [(adapter, PROMPTS[number % 3]) for number, adapter in enumerate((*names, BASE_MODEL, *names))]
    requests = [
        Request(
            prompt_ids=tuple(prompt), adapter=adapter,
            sampling=Sampling(max_new_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True),
        )
        for adapter, prompt in asked
    ]  # fmt: skip
    for (adapter, prompt), completion in zip(asked, engine.generate(requests), strict=True):
        tokens, logprobs = greedy(mixed, adapter, prompt)
        assert list(completion.token_ids) == tokens, adapter
        assert completion.logprobs is not None
        assert [entry.logprob for entry in completion.logprobs] == pytest.approx(logprobs, abs=2e-4), adapter
