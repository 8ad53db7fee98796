"""Every native task by name, and the files that a command line names. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mswift.errors import ConfigError, DataError
from mswift.eval.agents import AGENT_TASKS
from mswift.eval.documents import Doc
from mswift.eval.task import Task
from mswift.eval.tasks import LIBRARY_TASKS

TASKS: Mapping[str, Task] = {task.name: task for task in (*LIBRARY_TASKS, *AGENT_TASKS)}


@dataclass(frozen=True)
class Chosen:
    """A task with its rows and the examples that precede each question."""

    task: Task
    file: Path
    docs: list[Doc]
    examples: list[Doc] = field(default_factory=list)
    num_fewshot: int = 0

    def examples_for(self, doc: Doc) -> list[Doc]:
        """The first `num_fewshot` that go with the row. DataError where there are fewer."""
        group = self.task.example_of(doc)
        found = [one for one in self.examples if self.task.example_of(one) == group][: self.num_fewshot]
        if len(found) < self.num_fewshot:
            raise DataError(
                f"--num_fewshot {self.num_fewshot}: --fewshot_dataset {self.task.name} has {len(found)} examples"
                + (f" of {group}" if group else "")
            )
        return found


def choose(datasets: Sequence[str], fewshot: Sequence[str], num_fewshot: int | None, limit: int | None) -> list[Chosen]:
    """TASK=FILE texts as tasks with their rows. Raises ConfigError and DataError."""
    files, example_files = (
        _by_task(datasets, "--eval_dataset"),
        _by_task(fewshot, "--fewshot_dataset"),
    )
    if extra := [name for name in example_files if name not in files]:
        raise ConfigError(f"--fewshot_dataset {extra[0]}=...: --eval_dataset has no {extra[0]}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--eval_limit {limit}: at least 1 row")
    chosen = []
    for name, file in files.items():
        task = TASKS[name]
        wanted = task.num_fewshot if num_fewshot is None else num_fewshot
        if task.wants_chat:
            wanted = 0
        if wanted and name not in example_files:
            raise ConfigError(
                f"--eval_dataset {name}: {wanted} examples precede each question; give their file, --fewshot_dataset "
                f"{name}=FILE, or --num_fewshot 0"
            )
        docs = task.read(file)
        if not docs:
            raise DataError(f"--eval_dataset {name}={file}: no rows")
        examples = (task.read_examples or task.read)(example_files[name]) if wanted else []
        chosen.append(Chosen(task, file, docs[:limit], examples, wanted))
    return chosen


def _by_task(texts: Sequence[str], flag: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for given in texts:
        name, equals, file = given.partition("=")
        if not equals or not file:
            raise ConfigError(f"{flag} {given}: write TASK=FILE, for instance arc=arc_challenge.jsonl")
        if name not in TASKS:
            raise ConfigError(f"{flag} {given}: no task {name}; the tasks are {', '.join(TASKS)}")
        if name in found:
            raise ConfigError(f"{flag} {given}: {name} is given twice; evaluate one file after the other")
        if not Path(file).exists():
            raise ConfigError(f"{flag} {given}: no such file")
        found[name] = Path(file)
    return found
