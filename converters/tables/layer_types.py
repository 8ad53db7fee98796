"""Models whose layers are of two kinds: with a sliding window and without, each perhaps with its own rope."""

from collections.abc import Callable

from mswift.converters.fields import Fields
from mswift.converters.spec import LayerSpec, RopeSpec


def window(config: Fields, default: int | None = None, *, switch: str | None = None) -> int | None:
    """`sliding_window`, if it masks anything within max_position_embeddings.

    default: where the field is absent; switch: the field that turns it on, if there is one.
    """
    width, positions = config.optional_number("sliding_window", default), config.take("max_position_embeddings")
    on = config.flag(switch, False) if switch else True
    if not on or width is None or (isinstance(positions, int) and width >= positions):
        return None
    return config.integer("sliding_window", default)


def sliding(config: Fields, slides: Callable[[int], bool]) -> list[bool]:
    """Whether each layer has the sliding window: by `layer_types`, or by its number."""
    count = config.integer("num_hidden_layers")
    types = config.take("layer_types") or ["sliding_attention" if slides(n) else "full_attention" for n in range(count)]
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise config.refused("layer_types", f"holds {kind!r}; known: 'full_attention', 'sliding_attention'")
    if len(types) != count:
        raise config.refused("layer_types", f"has {len(types)} entries for {count} layers")
    return [kind == "sliding_attention" for kind in types]


def sliding_layers(
    config: Fields,
    slides: Callable[[int], bool] = lambda _layer: True,
    *,
    default: int | None = None,
    switch: str | None = None,
) -> tuple[LayerSpec, ...]:
    """For `ModelSpec.layers`: the layers with their windows, () if no window masks anything."""
    width, on = window(config, default, switch=switch), sliding(config, slides)
    off = switch is not None and not config.flag(switch, False)
    if config.take("layer_types") and any(on) and (off or config.optional_number("sliding_window", default) is None):
        why = f"{switch} is false" if off else "sliding_window is null"
        raise config.refused("layer_types", f"holds 'sliding_attention', but {why}")
    if width is None or not any(on):
        return ()
    return tuple(LayerSpec(window=width if slide else None) for slide in on)


def sliding_upper_layers(config: Fields) -> tuple[LayerSpec, ...]:
    """The same for Qwen2 and 3: a window from layer `max_window_layers` on, where `use_sliding_window` says so."""
    first = config.count("max_window_layers", 28)
    return sliding_layers(config, lambda layer: layer >= first, default=4096, switch="use_sliding_window")


def ropes_of_layer_types(
    config: Fields, full: tuple[str, float], sliding: tuple[str, float]
) -> tuple[RopeSpec, RopeSpec]:
    """The ropes of layers with full attention and with a window: nested in `rope_parameters`, or in plain fields.

    full, sliding: the plain field of their theta and its default; `rope_scaling` is that of full attention.
    """
    nested = dict(config.take("rope_parameters") or {})
    ropes = []
    for kind, (field, default) in (("full_attention", full), ("sliding_attention", sliding)):
        scaling = config.take("rope_scaling") if kind == "full_attention" else None
        given, name = (
            (nested.pop(kind, None) or {}, f"rope_parameters.{kind}") if nested else (scaling or {}, "rope_scaling")
        )
        theta = config.number(field, given.get("rope_theta", default))
        if given.get("rope_theta", theta) != theta:
            raise config.refused(field, f"is {theta}, but {name} has {given['rope_theta']}")
        ropes.append(config.rope_of(given, name, theta=theta))
    if nested:
        raise config.refused("rope_parameters", f"has unknown {sorted(nested)}")
    return ropes[0], ropes[1]
