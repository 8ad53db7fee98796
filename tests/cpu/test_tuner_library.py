"""mswift.tuners.library in a loop of one's own: adapters put on, switched, set aside, saved, merged. Oracle: PEFT."""

import ctypes
import re
import runpy
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mswift.errors import CheckpointError, ConfigError
from mswift.tuners.library import TunedModel, TunerConfig, prepare_model
from mswift.tuners.peft_config import read_peft_config
from tests.support.methods import tiny

TOKENS = torch.arange(24).view(2, 12) % 17
KINDS: dict[str, TunerConfig] = {
    "lora": TunerConfig("lora", fields={"r": 4}),
    "oft": TunerConfig("oft", fields={"oft_block_size": 8}),
    "vera": TunerConfig("vera", fields={"r": 4}),
    "vblora": TunerConfig("vblora", fields={"vector_length": 16, "num_vectors": 20}),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def randomised(model: TunedModel, seed: int = 0) -> TunedModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def losses_of_a_loop(model: Any, lr: float) -> list[float]:
    """Of eight steps of training, as a user writes them."""
    optimizer = torch.optim.AdamW(model.trained_parameters(), lr=lr)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_one_s_own(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny()
    before = logits(base)
    model = prepare_model(deepcopy(base), KINDS[kind])
    assert model.active == ("default",)
    losses = losses_of_a_loop(model, 2e-2)
    assert losses[-1] < 0.95 * losses[0]
    trained = logits(model)
    model.save(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "adapter"))), trained)
    again = prepare_model(deepcopy(base), KINDS[kind], "first")
    again.load(tmp_path / "adapter", "second")
    again.activate("second")
    assert torch.equal(logits(again), trained)
    again.deactivate()
    assert again.active == ()
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(again.unload()), before)
    merged = model.merge()
    assert not any("lora" in name or "oft_" in name for name, _ in merged.named_parameters())
    assert float((logits(merged) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())


def test_two_adapters_compute_their_sum_and_one_is_made_of_them() -> None:
    model = randomised(prepare_model(tiny(), KINDS["lora"], "a"))
    model.add(TunerConfig("lora", fields={"r": 2}, seed=1), "b")
    model.activate("b")
    randomised(model, 1)
    alone = logits(model)
    model.activate("a", "b")
    together = logits(model)
    assert float((together - alone).abs().max()) > 1e-3
    model.combine(["a", "b"], [1.0, 1.0], "both", "cat")
    model.activate("both")
    assert float((logits(model) - together).abs().max()) <= 1e-5 * float(together.abs().max())
    assert model.adapters == ("a", "b", "both")


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_an_adapter_set_aside_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    model = randomised(prepare_model(tiny(), KINDS[kind], "a"))
    wanted, size = logits(model), model.adapter_bytes("a")["cpu"]
    assert size == 4 * sum(parameter.numel() for parameter in model.trained_parameters())
    with pytest.raises(ConfigError, match="'a' is active"):
        model.set_aside("a", tmp_path / "a")
    model.add(KINDS[kind], "b")
    model.activate("b")
    model.set_aside("a", "cpu")
    assert model.adapter_bytes("a") == {"cpu": size}
    model.set_aside("a", tmp_path / "a")
    assert model.adapter_bytes("a") == {}
    with pytest.raises(ConfigError, match="bring_back first"):
        model.save(tmp_path / "copy", "a")
    logits(model)
    model.activate("a")
    assert torch.equal(logits(model), wanted)
    assert len(model.trained_parameters()) > 0


class Wide(nn.Module):
    """8 linears, whose LoRA of rank 512 has 64 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def resident() -> int:
    """Bytes of this process in memory, without what C's allocator keeps for later: that depends on tests before."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_what_is_set_aside_takes_no_memory(tmp_path: Path) -> None:
    names = tuple(map(str, range(8)))
    config = TunerConfig("lora", names, fields={"r": 512})
    model = prepare_model(Wide(), config, "a")
    model.add(config, "b")
    model.activate("b")
    size = model.adapter_bytes("a")["cpu"]
    assert size == 8 * 2 * 512 * 2048 * 4
    before = resident()
    model.set_aside("a", tmp_path / "a")
    freed = before - resident()
    print(f"an adapter of {size / 2**20:.0f} MiB set aside: {freed / 2**20:.0f} MiB less resident")
    assert freed > 0.9 * size
    model.bring_back("a")
    assert model.adapter_bytes("a")["cpu"] == size


def test_wrong_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    for config, message in (
        (TunerConfig("lorra"), "'lorra' is no method of PEFT; near: .*lora"),
        (TunerConfig("lora", fields={"rr": 4}), "LoraConfig has no field 'rr'; near: r"),
        (TunerConfig("lora", ("q_prj",)), "target_modules 'q_prj': no linear .* near: q_proj"),
        (TunerConfig("lora", fields={"init_lora_weights": "lora_ga"}), "'lora_ga' starts from data"),
        (TunerConfig("boft", fields={"boft_block_size": 4, "boft_block_num": 4}), "BOFTConfig: "),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_model(tiny(), config)
    model = prepare_model(tiny(), KINDS["lora"], "mine")
    with pytest.raises(ConfigError, match="no adapter 'mien'; near: mine"):
        model.activate("mien")
    with pytest.raises(ConfigError, match="'mine' is there already"):
        model.add(KINDS["lora"], "mine")
    with pytest.raises(ConfigError, match="'mine' is there already"):
        model.combine(["mine"], [2.0], "mine")  # PEFT does nothing then
    with pytest.raises(ConfigError, match=r"1 adapters \(mine\) and 2 weights: give one each"):
        model.combine(["mine"], [2.0, 1.0], "other")  # PEFT takes as many as both have
    for name in ("1", "self_attn", "a.b", ""):  # PEFT leaves tensors with ".1." in their names out of other files
        with pytest.raises(ConfigError, match=f"adapter '{name}': PEFT would take it"):
            model.add(KINDS["lora"], name)
        with pytest.raises(ConfigError, match=f"adapter '{name}': PEFT would take it"):
            prepare_model(tiny(), KINDS["lora"], name)
    oft = prepare_model(tiny(), KINDS["oft"])
    with pytest.raises(ConfigError, match="only LoRA .* are combined"):
        oft.combine(["default"], [1.0], "both")
    model.save(tmp_path / "adapter", "mine")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="without adapter_model.safetensors"):
        model.load(tmp_path / "adapter", "again")


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained(tmp_path / "Qwen3-0.6B")  # type: ignore[operator]
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "eva"])
def test_what_starts_as_a_part_of_the_base_is_saved_for_the_untouched_one(init: str, tmp_path: Path) -> None:
    from peft import EvaConfig, PeftModel

    base, batch = tiny(), {"input_ids": TOKENS, "labels": TOKENS}
    fields: dict[str, Any] = {"r": 4, "init_lora_weights": init}
    fields |= {"eva_config": EvaConfig(rho=1.0)} if init == "eva" else {}
    batches = [batch] if init in ("eva", "lora_ga") else None
    model = prepare_model(deepcopy(base), TunerConfig("lora", ("q_proj", "up_proj"), fields), batches=batches)
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=1e-4)
    matrices = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}
    assert any(bool(p.any()) for name, p in matrices.items() if "lora_B" in name) == (init != "eva")
    randomised(model)
    model.save(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)
    assert float((logits(model) - logits(base)).abs().max()) > 1e-2
    assert read_peft_config(tmp_path / "adapter").rank == (4 if init == "eva" else 8)
    beside = prepare_model(deepcopy(base), TunerConfig("lora", fields={"r": 2}), "first")
    beside.load(tmp_path / "adapter", "second")
    beside.activate("second")
    torch.testing.assert_close(logits(beside), logits(model), rtol=0, atol=1e-4)
    if init != "eva":
        check_that_none_is_put_beside(model, beside, tmp_path)


def check_that_none_is_put_beside(model: TunedModel, plain: TunedModel, folder: Path) -> None:
    """Another adapter would compute on a base without the start; the adapter itself comes back to that base."""
    before = logits(model)
    config = TunerConfig("lora", fields={"r": 2})
    with pytest.raises(ConfigError, match="has taken its start off the base, and no other is added"):
        model.add(config, "other")
    with pytest.raises(ConfigError, match="'default' .* no other is loaded"):
        model.load(folder / "adapter", "other")
    with pytest.raises(ConfigError, match="no other is combined"):
        model.combine(["default"], [0.5], "other")
    assert model.adapters == ("default",)
    model.deactivate()
    model.set_aside("default", folder / "aside")
    with pytest.raises(ConfigError, match="'default' lies in .*bring_back first"):
        model.set_aside("default", "cpu")
    model.activate("default")
    assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match="has changed the base weights as well"):
        plain.load(folder / "aside", "third")


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_virtual_tokens_in_a_loop_of_one_s_own(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny()
    before = logits(base)
    model = prepare_model(deepcopy(base), TunerConfig(kind, fields={"num_virtual_tokens": 4}))
    losses = losses_of_a_loop(model, 5e-2)
    assert losses[-1] < losses[0]
    trained = logits(model)
    model.save(tmp_path / "adapter")
    again: Any = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=1e-5)
    model.deactivate()
    assert model.active == ()
    assert torch.equal(logits(model), before)
    model.activate("default")
    assert torch.equal(logits(model), trained)
    check_which_prompt_is_trained(model, kind, tmp_path)
    with pytest.raises(ConfigError, match="virtual tokens change no weight of the model, and are not merged"):
        model.merge()
    assert torch.equal(logits(model.unload()), before)


def check_which_prompt_is_trained(model: TunedModel, kind: str, folder: Path) -> None:
    """The active virtual tokens alone, whichever way others came."""

    def trained() -> set[str]:
        return {name.split(".")[1] for name, parameter in model.peft.named_parameters() if parameter.requires_grad}

    model.add(TunerConfig(kind, fields={"num_virtual_tokens": 4}, seed=1), "added")
    model.load(folder / "adapter", "loaded")
    assert trained() == {"default"}
    for name in ("added", "loaded", "default"):
        model.activate(name)
        assert trained() == {name}


def test_starts_without_their_preparation_are_refused() -> None:
    for fields, batches, text in (
        ({"init_lora_weights": "eva"}, None, "'eva' starts from data, and is plain LoRA without"),
        ({"init_lora_weights": "lora_ga"}, [], "'lora_ga' starts from data"),
        ({"init_lora_weights": "corda"}, None, "'corda' is plain LoRA without a pass over data"),
        ({}, [{"input_ids": TOKENS}], "batches have no effect with init_lora_weights=None"),
    ):
        with pytest.raises(ConfigError, match=text):
            prepare_model(tiny(), TunerConfig("lora", fields=fields), batches=batches)
    model = prepare_model(tiny(), TunerConfig("lora", fields={"r": 4}))
    with pytest.raises(ConfigError, match="would take its start off the base of the other adapters"):
        model.add(TunerConfig("lora", fields={"init_lora_weights": "pissa"}), "other")
    with pytest.raises(ConfigError, match="prompt_tuning has virtual tokens, and no target_modules"):
        prepare_model(tiny(), TunerConfig("prompt_tuning", ("q_proj",), {"num_virtual_tokens": 2}))
