"""What an evaluation is: the frozen dataclass behind `mswift eval`."""

from dataclasses import dataclass
from typing import Literal

from mswift.config.agents import AgentTemplate


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Score a model on local files, without a network, or compare the scores of two: JSON, a table, a chart."""

    # -- what is scored
    model: str | None = None
    """Hugging Face directory. With eval_url: whose tokenizer encodes the prompts (needed for choices)."""
    adapters: tuple[str, ...] = ()
    """PEFT adapter directory (one)."""
    infer_backend: str = "transformers"
    """Generation engine, as mswift infer takes it."""
    engine_args: tuple[str, ...] = ()
    """NAME=VALUE, several: options of the infer_backend of its own, by its names, as tensor_parallel_size=2 (vllm),
    tp_size=2 (sglang), tp=2 (lmdeploy)."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights in memory. Default: what the checkpoint holds."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    eval_url: str | None = None
    """A server that speaks OpenAI's protocol, as http://127.0.0.1:8000/v1, instead of an engine in this process.
    Its key is read from the variable OPENAI_API_KEY."""
    served_model_name: str | None = None
    """eval_url: the model's name there. Default: the only one that it serves."""

    # -- what is asked
    eval_backend: Literal["native", "lm_eval", "evalscope", "opencompass"] = "native"
    """native reads the files of eval_dataset itself. lm_eval: tasks of lm-evaluation-harness on the same files, or
    any that its own data is here for. evalscope and opencompass: their data sets, against eval_url."""
    eval_dataset: tuple[str, ...] = ()
    """TASK=FILE, several. Native tasks: arc mmlu choices gsm8k bbh match text humaneval ifeval toolbench bfcl.
    Other backends: their own names; lm_eval also takes NAME=FILE."""
    fewshot_dataset: tuple[str, ...] = ()
    """TASK=FILE: where the examples that precede a question come from; its first rows are taken."""
    num_fewshot: int | None = None
    """Examples before each question. Default: as the task is published (gsm8k and mmlu 5, bbh 3, others 0)."""
    eval_limit: int | None = None
    """Only the first rows of each file."""
    use_chat_template: bool = False
    """Ask in conversations. Default: text to continue, as base models are scored; agents' tasks always converse."""
    agent_template: AgentTemplate | None = None
    """toolbench and bfcl: how tools and calls are written. Default: toolbench for the one, hermes for the other."""

    # -- how it answers
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: the task's."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities sum to top_p."""
    num_samples: int = 1
    """Answers to each problem of humaneval."""
    pass_k: tuple[int, ...] = (1,)
    """humaneval: the k of pass@k; num_samples must be as large."""
    sandbox: Literal["strict", "limits"] = "strict"
    """humaneval: how programs are confined. strict: no files, network or processes (Linux with Landlock and
    seccomp); limits: only time, memory, processes and an empty directory, for machines that you can lose."""
    max_batch_size: int = 8
    """Prompts answered together; requests at once for eval_url."""
    seed: int = 42
    """Of sampling and of the resamples behind the intervals."""

    # -- what comes out
    eval_output_dir: str = "eval-output"
    """results.json, report.md, chart.png and samples-TASK.jsonl; results that are there are not overwritten."""
    compare: tuple[str, ...] = ()
    """Two output directories: writes comparison.md, .json and .png into eval_output_dir, and evaluates nothing."""
    eval_args: tuple[str, ...] = ()
    """NAME=VALUE for the other backends. lm_eval: arguments of its evaluator (model=hf: it loads the model itself);
    evalscope: fields of its TaskConfig; opencompass: flags of its command."""
