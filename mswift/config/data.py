"""Options of `mswift data`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mswift.config.agents import AgentTemplate


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Show data as training sees it: the decoded text of each row, with the learned tokens marked."""

    action: Annotated[Literal["show"], tyro.conf.Positional]
    """show: print the first rows of --dataset."""
    model: str
    """Directory of the model whose tokenizer and chat template are used."""
    dataset: tuple[str, ...]
    """What --dataset of pt and sft takes: files, folders, hub data sets, PATH:SUBSET#N."""
    num_rows: int = 3
    """Rows to print of each item."""
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
