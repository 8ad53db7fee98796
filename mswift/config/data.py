"""Options of `mswift data`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mswift.config.agents import AgentTemplate


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data as training sees it: show its text with the learned tokens marked, tokenise it, say what is in it.

    `build` fills the token cache before GPUs are held: a run with the same flags finds its entry (one with
    --new_special_tokens has another tokenizer, and so an entry of its own).
    """

    action: Annotated[Literal["show", "build", "info"], tyro.conf.Positional]
    """show: print the first rows of --dataset. build: tokenise it into the cache. info: rows, tokens, lengths, what was
    rejected; of --dataset (built first), or of entries of the cache."""
    model: str | None = None
    """Directory of the model whose tokenizer and chat template are used; info of entries needs none."""
    dataset: tuple[str, ...]
    """What --dataset of pt and sft takes: files, folders, hub data sets, PATH:SUBSET#N, a YAML mixture. info: or
    directories that build printed."""
    val_dataset: tuple[str, ...] = ()
    """build, info: files to evaluate on, as of pt and sft."""
    split_dataset_ratio: float = 0.0
    """build, info: share of the rows of dataset that is evaluated on, as of pt and sft."""
    num_rows: int = 3
    """show: rows to print of each item."""
    cache_dir: str | None = None
    """build, info: where tokenised data sets are kept. Default: $MSWIFT_CACHE or ~/.cache/mswift."""
    dataset_num_proc: int | None = None
    """build, info: processes that tokenise. Default: one a processor, up to 8; 1 for less than 16 MiB of data."""
    kind: Literal["sft", "pt"] = "sft"
    """As conversations, or as plain text."""
    max_length: int = 2048
    """Tokens in a sample."""
    truncation_strategy: Literal["delete", "left", "right", "split", "raise"] = "delete"
    """What becomes of a longer one."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: a .jinja file, a .json file that holds one, or the
    name of one of the tokenizer's."""
    agent_template: AgentTemplate | None = None
    """How rows with tools, calls and results become text. Default: by the chat template, which gets the tools."""
    system: str | None = None
    """System message for rows that have none."""
    loss_scale: str = "default"
    """Which turns are learned and what their tokens count, as --loss_scale of sft."""
    enable_channel_loss: bool = False
    """build: keep the `channel` of every row, as a run with this flag does."""
    columns: str | None = None
    """Columns with other names, as JSON: '{"my_question": "query"}'."""
    dataset_sampling: Literal["without_replacement", "with_replacement", "first"] = "without_replacement"
    """How PATH#N chooses its rows."""
    seed: int = 42
    """Of the choice."""
    strict: bool = False
    """The first bad row is an error; without it the reason is printed in its place."""
    color: Literal["auto", "always", "never"] = "auto"
    """Learned tokens in green (auto: on a terminal), else between ⟦ and ⟧."""
