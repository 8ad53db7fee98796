"""vLLM in this process against transformers and PEFT: texts, log-probabilities, adapters, refusals."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from mswift.errors import ConfigError, DataError, MswiftError
from mswift.infer.backends import EngineConfig, open_engine
from mswift.infer.request import BASE_MODEL, Engine, Request, Sampling
from tests.support.shared import shared_file
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.vllm import needs_vllm, two_adapters

pytestmark = needs_vllm
LOGPROB_TOLERANCE = 5e-5
PROMPTS = ("Hello", "abc abc", "Once upon a time, there was", "7")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with heads of 32 (this build takes none below), and two LoRAs on it."""
    path = tmp_path_factory.mktemp("vllm")
    tiny_model(path / "model", head_dim=32, vocab_size=259, use_cache=True)
    tiny_tokenizer(path / "model")
    two_adapters(path / "model", path)
    return path


@pytest.fixture(scope="module")
def adapters(home: Path) -> dict[str, Path]:
    return {"first": home / "first", "second": home / "second"}


@pytest.fixture(scope="module")
def served(home: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    engine = open_engine("vllm", EngineConfig(home / "model", adapters, max_num_seqs=16))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(home: Path, adapters: dict[str, Path]) -> Engine:
    return open_engine("transformers", EngineConfig(home / "model", adapters))


def test_the_published_text() -> None:
    """stories260K with heads of 32; before the other engine, as a process has one at a time."""
    golden = json.loads(shared_file("data/weights/stories260K-golden.json").read_text(encoding="utf-8"))["greedy"]
    engine = open_engine("vllm", EngineConfig(shared_file("data/weights/stories260K-hd32-hf"), max_num_seqs=4))
    request = Request(prompt="", sampling=Sampling(max_new_tokens=golden["max_new_tokens"]))
    assert engine.generate([request])[0].text == golden["text"]
    engine.close()
    too_long = EngineConfig(shared_file("data/weights/stories260K-hd32-hf"), max_model_len=100_000)
    with pytest.raises(ConfigError, match=r"vLLM .* cannot serve it: .*100000"):
        open_engine("vllm", too_long)
    with pytest.raises(MswiftError, match="it was closed; open a new one"):
        engine.generate([request])


@pytest.mark.parametrize("adapter", [BASE_MODEL, "first", "second"])
def test_greedy_answers_and_log_probabilities_are_those_of_transformers(
    served: Engine, reference: Engine, adapter: str
) -> None:
    sampling = Sampling(max_new_tokens=24, logprobs=4)
    requests = [Request(prompt=prompt, adapter=adapter, sampling=sampling) for prompt in PROMPTS]
    found, expected = served.generate(requests), reference.generate(requests)
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.text for each in found] == [each.text for each in expected]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprobs is not None
        assert theirs.logprobs is not None
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=LOGPROB_TOLERANCE)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


def test_adapters_differ_and_may_be_mixed_in_a_batch(served: Engine) -> None:
    names = (BASE_MODEL, "first", "second")
    requests = [Request(prompt="Hello", adapter=name, sampling=Sampling(max_new_tokens=24)) for name in names]
    together = [each.token_ids for each in served.generate(requests)]
    assert together == [served.generate([request])[0].token_ids for request in requests]
    assert len(set(together)) == 3
    with pytest.raises(ConfigError, match="name one of them"):
        served.generate([Request(prompt="Hello")])


def test_scores_are_those_of_transformers_also_beside_adapters(served: Engine, reference: Engine) -> None:
    """Several pairs, on an engine with LoRA: without the way round, vLLM ends here (PROMPT_LOGPROBS)."""
    pairs = [([1, 2, 3], [4]), ([5, 6], [7, 8, 9]), ([10], list(range(11, 60))), ([250] * 200, [3] * 56)]
    for adapter in (BASE_MODEL, "first"):
        found, expected = served.score(pairs, adapter), reference.score(pairs, adapter)
        for (_, continuation), mine, theirs in zip(pairs, found, expected, strict=True):
            assert [token.token for token in mine.tokens] == continuation
            assert mine.is_greedy == theirs.is_greedy
            for a, b in zip(mine.tokens, theirs.tokens, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=LOGPROB_TOLERANCE)
                assert a.top[0][0] == b.top[0][0]
    with pytest.raises(DataError, match="has 257 tokens, the model takes 256"):
        served.score([([1] * 200, [2] * 57)], BASE_MODEL)
    with pytest.raises(DataError, match="an empty continuation"):
        served.score([([1], [])], BASE_MODEL)


def test_samples_have_streams_of_their_own(served: Engine) -> None:
    drawn = Request(
        prompt="Hello", adapter=BASE_MODEL, sampling=Sampling(max_new_tokens=16, temperature=1.0, seed=7, n=3)
    )
    alone = served.generate([drawn])
    assert [each.index for each in alone] == [0, 1, 2]
    assert len({each.token_ids for each in alone}) == 3
    neighbour = Request(prompt="abc", adapter=BASE_MODEL, sampling=Sampling(max_new_tokens=4))
    beside = served.generate([neighbour, drawn, neighbour])
    assert [each.token_ids for each in beside[1:4]] == [each.token_ids for each in alone]


def test_a_stream_may_be_left_and_stops_at_a_text(served: Engine) -> None:
    request = Request(prompt="Hello", adapter=BASE_MODEL, sampling=Sampling(max_new_tokens=30))
    whole = served.generate([request])[0]
    pieces = list(served.stream(request))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].completion == whole
    stream = served.stream(request)
    next(stream)
    stream.close()
    stop = whole.text[3:5]
    stopped = served.generate(
        [Request(prompt="Hello", adapter=BASE_MODEL, sampling=Sampling(max_new_tokens=30, stop=(stop,)))]
    )[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert served.generate([request])[0] == whole


def test_what_vllm_would_serve_wrongly_is_refused(served: Engine, home: Path, tmp_path: Path) -> None:
    from shutil import copytree

    from mswift.infer.vllm_adapters import check_vllm_adapter

    for field, value, reason in (("use_dora", True, "it is a DoRA"), ("modules_to_save", ["lm_head"], "lm_head")):
        changed = Path(copytree(home / "first", tmp_path / field))
        config = json.loads((changed / "adapter_config.json").read_text())
        (changed / "adapter_config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ConfigError, match=f"{reason}.*mswift merge"):
            check_vllm_adapter(changed)
    with pytest.raises(ConfigError, match="one engine of vLLM at a time"):
        open_engine("vllm", EngineConfig(home / "model"))
