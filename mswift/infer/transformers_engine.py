"""The embedded engine: a transformers model and PEFT adapters, continuously batched."""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mswift.data.chat_template import template_of_adapters, use_chat_template
from mswift.data.tokenizer import Tokenizer
from mswift.errors import ConfigError
from mswift.infer.answer import Answer, SteppedEngine
from mswift.infer.backends import EngineConfig
from mswift.infer.batch_cache import new_cache
from mswift.infer.loading import ActiveAdapter, load_adapters, load_model, load_tokenizer, pick_device
from mswift.infer.prompts import Limit, check_prompt, end_tokens, prompt_tokens
from mswift.infer.request import Request, Score, TokenPair, choose_adapter
from mswift.infer.scheduler import Scheduler
from mswift.infer.scoring import score_pairs
from mswift.infer.virtual import Fronts


def open_engine(config: EngineConfig) -> "TransformersEngine":
    """The engine on local files (mswift.infer.backends). Raises ConfigError and CheckpointError."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights": refused or loaded, a bar says nothing
    logging.set_verbosity_error()  # its load report is our error
    if config.options:
        raise ConfigError(f"the transformers engine takes no options of its own, and got {', '.join(config.options)}")
    tokenizer = load_tokenizer(config.model)
    trained_with = template_of_adapters(list(config.adapters.values()))
    if config.chat_template is not None or trained_with is not None:
        use_chat_template(cast(Tokenizer, tokenizer), config.chat_template or str(trained_with))
    model = load_model(config.model, config.torch_dtype, pick_device(config.device))
    return TransformersEngine(
        model, tokenizer, config.adapters, max_rows=config.max_num_seqs, max_length=config.max_model_len
    )


class TransformersEngine(SteppedEngine):
    """Answers requests with a transformers model (mswift.infer.request.Engine).

    It computes only while it is asked: `stream` makes the next token when its reader wants the next piece. Threads take
    turns, token by token.
    """

    score_beyond = 1
    """The last token of a continuation is no input."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Mapping[str, Path] | None = None,
        max_rows: int = 64,
        max_length: int | None = None,
    ) -> None:
        new_cache(model)  # refuses what cannot be batched
        self.base_model = model
        self.tokenizer = tokenizer
        self.adapters = tuple(adapters or {})
        self._fronts = Fronts(model, adapters or {})
        self.model = load_adapters(model, adapters or {})
        self._active = ActiveAdapter(self.model, [name for name in self.adapters if name not in self._fronts])
        self._end_tokens = end_tokens(model.generation_config, tokenizer)
        own = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0)) or None
        if max_length is not None and own is not None and max_length > own:
            raise ConfigError(f"--max_model_len {max_length}: at most the model's max_position_embeddings, {own}")
        self.max_length = max_length or own
        """Tokens of a prompt and its answer together; None: no limit."""
        self._limit = Limit(own) if max_length is None else Limit(max_length, "--max_model_len")
        embedding: Any = model.get_input_embeddings()
        self._rows = int(embedding.weight.shape[0])
        self._scheduler = Scheduler(self.model, self._active.use, max_rows, self._fronts.of)
        self._turn = threading.Lock()

    def prompt_tokens(self, request: Request) -> list[int]:
        """Token ids that the model is given for a request. Raises DataError."""
        return prompt_tokens(self.tokenizer, request)

    def check(self, prompt: list[int], adapter: str | None = None) -> None:
        """DataError for tokens that the model cannot take, or that leave no room for another."""
        check_prompt(prompt, self.tokenizer, self._rows, self._limit, self._fronts.of(adapter).length)

    def _room(self, adapter: str | None) -> int | None:
        """Tokens of a prompt and its answer together, behind what the adapter puts before them."""
        return None if self.max_length is None else self.max_length - self._fronts.of(adapter).length

    def submit(self, request: Request) -> list[Answer]:
        """Its n answers, which grow with every `step` from now on. Raises DataError and ConfigError."""
        adapter = choose_adapter(request.adapter, self.adapters)
        prompt = self.prompt_tokens(request)
        self.check(prompt, adapter)
        room = request.sampling.max_new_tokens
        if (limit := self._room(adapter)) is not None:
            room = min(room, limit - len(prompt))
        answers = [
            Answer(request, prompt, room, self._end_tokens, cast(Any, self.tokenizer), index)
            for index in range(request.sampling.n)
        ]
        self._scheduler.add(answers, adapter)
        return answers

    def step(self) -> bool:
        """One token of every answer; False when there is nothing to do."""
        with self._turn:
            if not self._scheduler.busy:
                return False
            self._scheduler.step()
            return True

    def drop(self, answers: Sequence[Answer]) -> None:
        """Stop work on answers that nobody wants."""
        for answer in answers:
            answer.give_up()
        if self._turn.acquire(blocking=False):  # else the step under way, or the next one, sweeps
            try:
                self._scheduler.sweep()
            finally:
                self._turn.release()

    @property
    def load(self) -> tuple[int, int]:
        """How many answers are growing and how many have not begun."""
        return self._scheduler.num_running, self._scheduler.num_waiting

    def score(self, pairs: Sequence[TokenPair], adapter: str | None = None) -> list[Score]:
        """Log-probabilities of continuations (Engine)."""
        name = choose_adapter(adapter, self.adapters)
        for prompt, continuation in pairs:
            self.check([*prompt, *continuation[:-1]], name)
        with self._turn:
            return score_pairs(self.model, pairs, lambda: self._active.use(name), self._fronts.of(name))

    def close(self) -> None:
        """Forget the model (Engine)."""
        with self._turn, contextlib.suppress(AttributeError):
            del self.model, self.base_model, self._scheduler, self._active
