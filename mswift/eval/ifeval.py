"""IFEval: whether an answer follows its instructions, by the checks of lm-evaluation-harness. Torch-free."""

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mswift.errors import ConfigError
from mswift.eval.documents import Doc
from mswift.eval.statistics import Metric
from mswift.eval.task import Settings, Values

_DATA = "tokenizers/punkt_tab"
_NEED_DATA = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
"""Instructions whose checks ask NLTK for sentences; the others need no data."""


def check(docs: Sequence[Doc]) -> None:
    """ConfigError where the checks of these rows cannot be run here: a package is missing, or NLTK's punkt_tab."""
    _library()
    needed = [doc for doc in docs if any(name in _NEED_DATA for name in doc["instruction_id_list"])]
    if needed and not _has_data():
        names = ", ".join(name.partition(":")[2] for name in _NEED_DATA)
        raise ConfigError(
            f"ifeval: {len(needed)} of {len(docs)} rows ({names}) need NLTK's punkt_tab, which is not here: put its "
            "folder, as tokenizers/punkt_tab, into one that the variable NLTK_DATA names; or leave these rows out"
        )


def values(doc: Doc, answer: str) -> Values:
    """Followed or not: all of a row's instructions, and each; strictly and loosely."""
    found: Values = {}
    for name, followed in _library().process_results(doc, [answer]).items():
        lists = isinstance(followed, list)
        found[name] = [float(sum(followed)), float(len(followed))] if lists else float(followed)
    return found


def metrics(settings: Settings) -> tuple[Metric, ...]:
    """By prompt and by instruction."""
    prompts = (Metric(f"prompt_level_{how}_acc", binary=True) for how in ("strict", "loose"))
    return (*prompts, *(Metric(f"inst_level_{how}_acc") for how in ("strict", "loose")))


def _has_data() -> bool:
    import nltk

    try:
        nltk.data.find(_DATA)
    except LookupError:
        return False
    return True


@cache
def _library() -> Any:
    """lm-eval's module. It looks for punkt_tab when it is imported, and would download it: it finds an empty folder."""
    try:
        import nltk

        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / _DATA).mkdir(parents=True)
            nltk.data.path.append(folder)
            try:
                from lm_eval.tasks.ifeval import utils
            finally:
                nltk.data.path.remove(folder)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"ifeval: its checks are lm-eval's, which need {error.name}: pip install 'mswift[eval]'"
        ) from None
    return utils
