"""vLLM in this process, as an engine; `mswift.infer.vllm_options` says what it is told and lists its defects.

Import only where vLLM is installed.
"""

import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from mswift.data.chat_template import template_of_adapters, use_chat_template
from mswift.data.tokenizer import Tokenizer
from mswift.errors import ConfigError, DataError, MswiftError
from mswift.infer.answer import Answer, SteppedEngine
from mswift.infer.backends import EngineConfig
from mswift.infer.loading import load_tokenizer
from mswift.infer.prompts import Limit, check_prompt, end_tokens, prompt_tokens
from mswift.infer.request import Request, Sampling, Score, TokenLogprob, TokenPair, choose_adapter
from mswift.infer.vllm_adapters import check_vllm_adapter
from mswift.infer.vllm_options import INSTALL, WORKER, vllm_environment, vllm_options, vllm_version


def open_engine(config: EngineConfig) -> "VllmEngine":
    """The engine on local files (mswift.infer.backends). Raises ConfigError and CheckpointError."""
    installed = vllm_version()
    if installed is None:
        raise ConfigError(f"--infer_backend vllm: vLLM is not installed here: {INSTALL}")
    options = vllm_options(config, installed)
    shared = _check_process()
    tokenizer = load_tokenizer(config.model)
    trained_with = template_of_adapters(list(config.adapters.values()))
    if config.chat_template is not None or trained_with is not None:
        use_chat_template(cast(Tokenizer, tokenizer), config.chat_template or str(trained_with))
    os.environ.update(vllm_environment(installed, in_process=True))  # vLLM has no other way to be told
    options.setdefault("worker_extension_cls", WORKER)
    if "cpu" in installed:
        options.setdefault("distributed_executor_backend", "uni")
    try:
        from vllm import LLM

        llm = LLM(**options)
    except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(f"--model {config.model}: vLLM {installed} cannot serve it: {_brief(error)}") from error
    return VllmEngine(llm, tokenizer, config.adapters, owns_groups=not shared)


def _check_process() -> bool:
    """Whether the process has process groups of its own, which must outlive vLLM's (OWN_GROUPS).

    ConfigError where vLLM cannot live in it: beside another engine, or in a rank of several.
    """
    import torch.distributed as dist

    if any(not engine.closed for engine in list(_engines)):
        raise ConfigError("one engine of vLLM at a time in a process: close the other one first")
    if not dist.is_initialized():
        return False
    if dist.get_world_size() > 1:
        raise ConfigError(
            f"vLLM cannot live in a rank of a job of {dist.get_world_size()}: start it as a server "
            "(mswift.infer.vllm_server)"
        )
    return True


_engines: "weakref.WeakSet[VllmEngine]" = weakref.WeakSet()


class VllmEngine(SteppedEngine):
    """Answers requests with vLLM (mswift.infer.request.Engine); it computes only while it is asked.

    After an exception inside vLLM it refuses further work (AFTER_ERRORS): the next step could hang.
    """

    score_beyond = 0
    """The last token of a continuation is no input, but is written."""

    def __init__(self, llm: Any, tokenizer: Any, adapters: Mapping[str, Path], *, owns_groups: bool) -> None:
        self.llm = llm
        self.closed = False
        self._owns_groups = owns_groups
        self.tokenizer = tokenizer
        self._engine = llm.llm_engine
        model = self._engine.model_config
        self.max_length: int = model.max_model_len
        """Tokens of a prompt and its answer together."""
        self._rows: int = model.get_vocab_size()
        self._end_tokens = end_tokens(SimpleNamespace(**model.try_get_generation_config()), tokenizer)
        self._numbers = itertools.count()
        self._growing: dict[str, Answer] = {}
        self._lora_numbers = itertools.count(1)
        self._loras = {name: self._lora_request(name, path) for name, path in adapters.items()}
        self._turn = threading.RLock()
        self._failure: str | None = None
        _engines.add(self)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `Request.adapter` may take."""
        return tuple(self._loras)

    def prompt_tokens(self, request: Request) -> list[int]:
        """Token ids that the model is given for a request. Raises DataError."""
        return prompt_tokens(self.tokenizer, request)

    def submit(self, request: Request) -> list[Answer]:
        """Its n answers, which grow with every `step` from now on. Raises DataError and ConfigError."""
        lora = self._lora(request.adapter)
        prompt = self.prompt_tokens(request)
        check_prompt(prompt, self.tokenizer, self._rows, Limit(self.max_length, "vLLM's max_model_len"))
        room = min(request.sampling.max_new_tokens, self.max_length - len(prompt))
        answers = [
            Answer(request, prompt, room, self._end_tokens, self.tokenizer, index)
            for index in range(request.sampling.n)
        ]
        with self._alive():
            for answer in answers:
                name = str(next(self._numbers))
                self._engine.add_request(
                    name,
                    {"prompt_token_ids": list(prompt)},
                    _params(request.sampling, room, answer.index, self._end_tokens),
                    lora_request=lora,
                )
                self._growing[name] = answer
        return answers

    def step(self) -> bool:
        """One step of the model; False when there is nothing to do."""
        with self._alive():
            if not self._growing:
                return False
            for output in self._engine.step():
                answer = self._growing.get(output.request_id)
                if answer is not None:
                    self._grow(output.request_id, answer, output.outputs[0])
            return True

    def _grow(self, name: str, answer: Answer, output: Any) -> None:
        for place, token in enumerate(output.token_ids):
            if not answer.ended:
                found = output.logprobs[place] if output.logprobs else None
                answer.add(token, found and _logprob(token, found, answer.sampling.logprobs or 0))
        if output.finish_reason is not None:
            del self._growing[name]
            if not answer.ended:
                answer.error = MswiftError(f"vLLM ended an answer before its end ({output.finish_reason})")
        elif answer.ended:  # by a stop text
            self._forget([name])

    def drop(self, answers: Sequence[Answer]) -> None:
        """Stop work on answers that nobody wants."""
        unwanted = {id(answer) for answer in answers}
        if self._failure is None:
            with self._alive():
                self._forget([name for name, answer in self._growing.items() if id(answer) in unwanted])

    def _forget(self, names: Sequence[str]) -> None:
        if names:
            self._engine.abort_request(list(names))
        for name in names:
            del self._growing[name]

    def score(self, pairs: Sequence[TokenPair], adapter: str | None = None) -> list[Score]:
        """Log-probabilities of continuations (Engine); the last token of each is what is generated, forced."""
        from vllm import SamplingParams

        lora = self._lora(adapter)
        prompts, params = [], []
        for number, (prompt, continuation) in enumerate(pairs, start=1):
            _check_pair(number, prompt, continuation, self.max_length)
            prompts.append({"prompt_token_ids": [*map(int, prompt), *map(int, continuation[:-1])]})
            params.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=1,
                    detokenize=False,
                    logprobs=1,
                    prompt_logprobs=1 if len(continuation) > 1 else None,
                    allowed_token_ids=[int(continuation[-1])],
                )
            )
        together = len(pairs) if self._engine.vllm_config.lora_config is None else 1  # PROMPT_LOGPROBS
        with self._alive():
            outputs: list[Any] = []
            for start in range(0, len(pairs), max(together, 1)):
                part = slice(start, start + together)
                outputs += self.llm.generate(prompts[part], params[part], use_tqdm=False, lora_request=lora)
        return [_score(output, prompt, tokens) for output, (prompt, tokens) in zip(outputs, pairs, strict=True)]

    def load_adapter(self, name: str, path: Path) -> None:
        """Take an adapter from files from now on, in place of one of that name if there is one. Raises ConfigError."""
        check_vllm_adapter(path)
        with self._alive():
            if self._growing:
                raise MswiftError(f"{path}: answers are still growing; let them end before an adapter changes")
            old = self._loras.pop(name, None)
            if old is not None:  # first, so that the last slot stays empty (BASE_BESIDE_ADAPTERS)
                self._engine.remove_lora(old.lora_int_id)
            new = self._lora_request(name, path)
            if not self._engine.add_lora(new):
                raise MswiftError(f"{path}: vLLM did not load this adapter")
            self._loras[name] = new

    def reset_prefix_cache(self) -> None:
        """Forget what was computed with other weights. MswiftError while answers grow."""
        with self._alive():
            if not self.llm.reset_prefix_cache():
                raise MswiftError("vLLM did not reset its prefix cache: answers are still growing; let them end first")

    def give_up(self, why: str) -> None:
        """Refuse further work."""
        self._failure = why

    def close(self) -> None:
        """Give back memory and processes (Engine)."""
        if self.closed:
            return
        self.closed = True
        self.give_up(self._failure or "it was closed")
        self._growing.clear()
        if self._owns_groups:
            self._engine.engine_core.shutdown()
        else:
            self._engine.engine_core._finalizer.detach()
            _shut_down_but_for_groups(self._engine.engine_core.engine_core)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """One thread at a time, and none after a failure."""
        with self._turn:
            if self._failure is not None:
                raise MswiftError(f"this vLLM engine answers no more: {self._failure}; open a new one")
            try:
                yield
            except MswiftError:
                raise
            except Exception as error:
                self.give_up(f"{type(error).__name__}: {_brief(error)}")
                raise

    def _lora(self, name: str | None) -> Any:
        chosen = choose_adapter(name, self.adapters)
        return None if chosen is None else self._loras[chosen]

    def _lora_request(self, name: str, path: Path) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, next(self._lora_numbers), str(Path(path).resolve()))


def _shut_down_but_for_groups(core: Any) -> None:
    """OWN_GROUPS: what vLLM's `EngineCore.shutdown` does, without ending torch.distributed for the whole process."""
    import gc

    from vllm.distributed import parallel_state

    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()
    parallel_state.destroy_model_parallel()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None


def _params(sampling: Sampling, room: int, index: int, end: frozenset[int]) -> Any:
    """vLLM's parameters of one answer; text and its end are made of the tokens here, as by every engine."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else end)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        seed=sampling.seed + index if sampling.temperature > 0 else None,
        max_tokens=room,
        stop_token_ids=sorted(stops),
        ignore_eos=True,
        logprobs=sampling.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _logprob(token: int, found: Mapping[int, Any], alternatives: int) -> TokenLogprob:
    """vLLM's log-probabilities of one place; it tells the token's own beside the likeliest."""
    likeliest = sorted(found.items(), key=lambda entry: (-entry[1].logprob, entry[1].rank or 0))[:alternatives]
    return TokenLogprob(token, found[token].logprob, tuple((other, each.logprob) for other, each in likeliest))


def _check_pair(number: int, prompt: Sequence[int], continuation: Sequence[int], limit: int) -> None:
    if not prompt or not continuation:
        which = "prompt" if not prompt else "continuation"
        raise DataError(f"pair {number} to score: an empty {which}; begin with the tokenizer's start or end token")
    size = len(prompt) + len(continuation)
    if size > limit:
        raise DataError(f"pair {number} to score has {size} tokens, the model takes {limit} (max_model_len)")


def _score(output: Any, prompt: Sequence[int], continuation: Sequence[int]) -> Score:
    told = [*(output.prompt_logprobs or [])[len(prompt) :], output.outputs[0].logprobs[0]]
    return Score(tuple(_logprob(int(t), found, 1) for t, found in zip(continuation, told, strict=True)))


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
