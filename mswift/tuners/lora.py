"""What an adapter run trains: the adapter as PEFT would describe it, and how it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mswift.converters.plan import ModelTable
from mswift.errors import ConfigError
from mswift.tuners.settings import FROM_DATA, PeftSettings
from mswift.tuners.shapes import STACKED, HfParameter, adapted_linears, adapted_parameters, in_spelling
from mswift.tuners.targets import chosen


@dataclass(frozen=True)
class LoraConfig:
    """settings: which modules, ranks and scales; seed: of the start values.

    per_expert: one LoRA for the linear of every expert, as files of transformers 4 have it, in place of stacked ones.
    """

    settings: PeftSettings
    seed: int = 0
    per_expert: bool = False

    @staticmethod
    def plain(rank: int, alpha: float, target_modules: Sequence[str], seed: int = 0) -> "LoraConfig":
        """Of these linears, all at one rank and scale."""
        return LoraConfig(PeftSettings(rank=rank, alpha=alpha, target_modules=tuple(target_modules)), seed)

    @staticmethod
    def for_table(
        table: ModelTable,
        *,
        rank: int,
        alpha: float,
        target_modules: Sequence[str],
        target_parameters: Sequence[str] = (),
        rslora: bool = False,
        dora: bool = False,
        dropout: float = 0.0,
        init: str = "true",
        seed: int = 0,
    ) -> "LoraConfig":
        """As the flags say it, with target_modules expanded on this model; ConfigError for what is not trained."""
        if rank < 1:
            raise ConfigError(f"--lora_rank {rank}: a rank is at least 1; 8 is usual")
        if alpha <= 0:
            raise ConfigError(f"--lora_alpha {alpha}: the scale alpha / rank must be positive; 32 is usual")
        settings = chosen(table, rank=rank, alpha=alpha, modules=target_modules, parameter_names=target_parameters)
        own = LoraConfig(replace(settings, rslora=rslora, dora=dora, dropout=dropout, init=init), seed)
        own.check("")
        own.check_data_start(table)
        return own

    def check(self, where: str) -> None:
        """ConfigError for a combination that neither PEFT nor training has; `where` begins the message."""
        settings = self.settings
        flags = {
            "use_dora": settings.dora,
            "lora_dropout": settings.dropout,
            f"init_weights {settings.init}": settings.init != "true",
        }
        on = [name for name, value in flags.items() if value]
        gate = "shared_expert_gate" in settings.target_modules and "--target_modules shared_expert_gate"
        what = f"--target_parameters {' '.join(settings.target_parameters)}" if settings.target_parameters else gate
        if what and on:
            raise ConfigError(
                f"{where}--{on[0]} with {what}: PEFT has no such adapter of experts, routers and gates: leave "
                f"--{on[0]} out, or adapt other modules only (--target_modules q_proj k_proj v_proj o_proj)"
            )
        if len(on) > 1:
            raise ConfigError(f"{where}--{on[0]} with --{on[1]} is not computed yet: leave one of them out")
        if settings.lora_bias:
            raise ConfigError(f"{where}lora_bias=True is not supported by training; train without the biases of B")

    def check_data_start(self, table: ModelTable) -> None:
        """ConfigError for a rank of which a linear has too few directions to start from data."""
        init = self.settings.init
        if init not in FROM_DATA:
            return
        for each in adapted(self.own_table(table), self).values():
            most = min(each.in_features, each.out_features) if init == "lora_ga" else each.in_features
            if 2 * each.rank > most:
                raise ConfigError(
                    f"--init_weights {init}: of {each.name} it takes {2 * each.rank} directions, 2 x --lora_rank "
                    f"{each.rank}, of {most}: use --lora_rank {most // 2} or less, or leave {each.leaf} out of "
                    "--target_modules"
                )

    def own_table(self, table: ModelTable) -> ModelTable:
        """The table in the spelling of experts in which the adapter names them."""
        return in_spelling(table, "experts_each" if self.per_expert else STACKED)


@dataclass(frozen=True)
class Adapted:
    """One A [rank, in] and B [out, rank]: of a linear, or of one expert of a stacked parameter.

    prefix: of the names of A and B; name: of the linear or parameter. PEFT keeps the experts of a parameter in one A
    [rank * experts, in], experts apart, and one B [out, rank * experts], experts next to each other.
    """

    prefix: str
    name: str
    in_features: int
    out_features: int
    rank: int
    scale: float
    num_experts: int = 1
    expert: int = 0
    dora: bool = False
    dropout: float = 0.0
    init: str = "true"

    @property
    def starts_in_weight(self) -> bool:
        """Whether A and B start as a part of the weight, which is not to be added twice."""
        return self.init not in ("true", "eva")

    @property
    def name_magnitude(self) -> str:
        return f"{self.prefix}.lora_magnitude_vector"

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def name_a(self) -> str:
        return f"{self.prefix}.lora_A.weight"

    @property
    def name_b(self) -> str:
        return f"{self.prefix}.lora_B.weight"


def adapted(table: ModelTable, config: LoraConfig) -> Mapping[str, Adapted]:
    """Name of a linear or parameter -> its adapter. `table`: `LoraConfig.own_table`."""
    settings = config.settings
    found = {
        linear.name: Adapted(
            linear.name,
            linear.name,
            linear.in_features,
            linear.out_features,
            settings.rank_of(linear.name),
            settings.scale_of(linear.name),
            dora=settings.dora,
            dropout=settings.dropout,
            init=settings.init,
        )
        for linear in adapted_linears(table, settings)
    }
    return found | {
        p.name: _of_parameter(prefix, p, settings) for prefix, p in adapted_parameters(table, settings).items()
    }


def _of_parameter(prefix: str, parameter: HfParameter, settings: PeftSettings) -> Adapted:
    return Adapted(
        prefix,
        parameter.name,
        parameter.in_features,
        parameter.out_features,
        settings.rank_of(parameter.name),
        settings.scale_of(parameter.name),
        parameter.num_experts,
    )
