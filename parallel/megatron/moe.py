"""A mixture of experts in place of the MLP for megatron-core: its MoELayer with a router of ours, on PyTorch alone.

Tokens travel by all-to-all over expert-parallel ranks and are gathered over expert-tensor-parallel ones; the experts
themselves are in `experts.py`. No auxiliary loss. Shapes: s sequence, b batch, n tokens of this rank, e experts.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mswift.converters.spec import ModelSpec, MoeSpec
from mswift.parallel.activations import activation_class
from mswift.parallel.megatron.experts import Experts, LocalDispatcher
from mswift.parallel.megatron.linears import BiasedColumnParallelLinear, BiasedRowParallelLinear
from mswift.parallel.routing import route


class ExpertRouter(Router):
    """megatron-core's router with the routing of `mswift.parallel.routing`.

    The logits are computed in fp32 whatever the model's dtype, as megatron-core advises. `expert_bias` [e] fp32 is the
    correction bias of the choice: a buffer, which training leaves as it is.
    """

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection, moe: MoeSpec) -> None:
        super().__init__(config, pg_collection)
        self._moe = moe
        device = torch.cuda.current_device()
        self.weight.data = self.weight.data.to(device)  # megatron-core makes it on the CPU
        if moe.router_bias:
            self.bias = nn.Parameter(torch.empty(moe.num_experts, dtype=config.params_dtype, device=device))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        correction = torch.zeros(moe.num_experts, device=device) if moe.correction_bias else None
        self.register_buffer("expert_bias", correction)
        self.lora: nn.Module | None = None  # of the weight

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[s, b, hidden] -> (weights [n, e], zero where not chosen; chosen [n, e] bool)."""
        weight = self.weight if self.lora is None else self.lora(self.weight)
        logits = router_gating_linear(input, weight, self.bias, torch.float32).flatten(0, -2)
        weights, chosen = route(logits, self.expert_bias, self._moe)
        spread = torch.zeros_like(logits).scatter(1, chosen, weights)
        return spread, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Part of megatron-core's interface that `forward` does without."""
        raise NotImplementedError


class BiasedExpertOut(BiasedRowParallelLinear):
    """The second linear of an expert with biases.

    What crosses ranks is the dispatcher's business, as megatron-core has it where experts are shared between ranks;
    without that, its reduction over one rank returns a view, on which adding the weighted bias in place fails.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True


class SharedExpert(SharedExpertMLP):
    """The expert of every token, whose gate may have an adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora: nn.Module | None = None  # of the gate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[s, b, hidden] -> the same."""
        output, _ = MLP.forward(self, hidden_states)
        if self.gate_weight is not None:
            weight = self.gate_weight if self.lora is None else self.lora(self.gate_weight)
            output = output * nn.functional.sigmoid(nn.functional.linear(hidden_states, weight))
        return output  # type: ignore[no-any-return]


def moe_mlp_spec(spec: ModelSpec) -> ModuleSpec:
    """The experts of a layer, with the expert of every token beside them where the model has one."""
    assert spec.moe is not None
    column = BiasedColumnParallelLinear if spec.moe.expert_bias else ColumnParallelLinear
    row = BiasedExpertOut if spec.moe.expert_bias else RowParallelLinear
    activation = activation_class(spec)
    shared = MLPSubmodules(ColumnParallelLinear, activation, RowParallelLinear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=Experts, submodules=MLPSubmodules(column, activation, row)),
            shared_experts=ModuleSpec(module=SharedExpert, submodules=shared),
            router=partial(ExpertRouter, moe=spec.moe),
        ),
    )


def moe_options(moe: MoeSpec | None) -> dict[str, object]:
    """The fields of megatron-core's TransformerConfig; routing itself is `ExpertRouter`'s."""
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.top_k,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_gate,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
        "moe_permute_fusion": False,
    }


def mark_experts(model: nn.Module) -> None:
    """Tell the parameters of experts from the others; to be called before the data-parallel wrap.

    megatron-core 0.16 counts them as dense while there is no expert parallelism. That leaves their gradients
    unsummed where expert tensor parallelism differs from that of the dense layers: expert data parallelism is then
    another group. Nor is a bias of the second linear one that sequence parallelism has to sum.
    """
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for parameter in experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            if not hasattr(parameter, "tensor_model_parallel"):  # one expert's, not a copy of another rank's
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)


def keep_tokens_local(model: nn.Module) -> None:
    """Where no token leaves its rank, nothing is made ready for sending."""
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        if LocalDispatcher.fits(layer.config, layer.token_dispatcher):
            layer.token_dispatcher = LocalDispatcher(layer.config.moe_router_topk)
