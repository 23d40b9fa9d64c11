"""Every bridge by its kind: a new bridge needs its own file and its lines here."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, assert_never, get_args

from qformer.bridges.cascaded import Cascaded, CascadedConfig
from qformer.bridges.concatenate import Concatenate, ConcatenateConfig
from qformer.bridges.mean import Mean, MeanConfig
from qformer.bridges.protocol import Bridge
from qformer.bridges.spatio_temporal import SpatioTemporal, SpatioTemporalConfig
from qformer.config import QFormerConfig

BridgeConfig = (
    ConcatenateConfig  #
    | MeanConfig
    | CascadedConfig
    | SpatioTemporalConfig
)
IMAGE_BRIDGE = ConcatenateConfig()
"""BLIP-2's and InstructBLIP's bridge, which is built where none is named."""


def build_bridge(config: BridgeConfig, qformer: QFormerConfig) -> Bridge:
    """Build the bridge that a config describes.

    Args:
        config: Kind and sizes.
        qformer: Shapes of the Q-Former of one image.
    """
    match config:
        case ConcatenateConfig():
            return Concatenate(config, qformer)
        case MeanConfig():
            return Mean(config, qformer)
        case CascadedConfig():
            return Cascaded(config, qformer)
        case SpatioTemporalConfig():
            return SpatioTemporal(config, qformer)
        case _:
            assert_never(config)


def bridge_config(values: Mapping[str, Any]) -> BridgeConfig:
    """Build the config that a mapping with a `kind` describes.

    Raises:
        ValueError: If there is no such kind, or a size is not positive.
        TypeError: If the kind has no such field.
    """
    members = get_args(BridgeConfig)
    kinds = {str(field.default): one for one in members for field in fields(one) if field.name == "kind"}
    if (kind := values.get("kind")) not in kinds:
        raise ValueError(f"bridge kind={kind!r} is none of {', '.join(kinds)}")
    return kinds[kind](**values)
