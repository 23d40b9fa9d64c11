"""Low-rank updates of a frozen language model that leave the model itself alone.

The updates are forward hooks on chosen linear layers; their weights live here, in the bridge's trainables, and never
in the language model: its modules, parameter names and bytes stay what they were.

Dimensions: I input width, O output width, R rank.
Reference: LoRA (arXiv:2106.09685), section 4.1.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from qformer.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Size and place of the updates.

    Raises:
        ValueError: If a value is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj", "c_attn", "q", "v")
    """Last part of the names of the layers to update: query and value of OPT/Llama/Qwen, GPT-2 and T5."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"LoRA needs rank >= 1, alpha > 0 and dropout in [0, 1), got rank={self.rank}, alpha={self.alpha}, "
                f"dropout={self.dropout}"
            )


class Lora(nn.Module):
    """The updates of one language model, attached on construction.

    Args:
        language_model: Any module with linear layers of the targets' names (`nn.Linear`, or GPT-2's transposed one).
        config: See `LoraConfig`.

    Raises:
        UserError: If no layer has a target's name.
    """

    def __init__(self, language_model: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        self.scale, self.dropout = config.alpha / config.rank, nn.Dropout(config.dropout)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.handles: list[RemovableHandle] = []
        linear = {name: layer for name, layer in language_model.named_modules() if _widths(layer) is not None}
        chosen = {name: layer for name, layer in linear.items() if name.rsplit(".", 1)[-1] in config.targets}
        if not chosen:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(f"model.lora.targets={list(config.targets)} name no layer of the model; it has {known}")
        for name, layer in chosen.items():
            width_in, width_out = cast(tuple[int, int], _widths(layer))
            key = name.replace(".", "/")  # parameter names cannot hold dots
            self.down[key] = nn.Parameter(torch.empty(config.rank, width_in))
            nn.init.kaiming_uniform_(self.down[key], a=math.sqrt(5))
            # Zero, so that an untrained update changes nothing.
            self.up[key] = nn.Parameter(torch.zeros(width_out, config.rank))
            self.handles.append(layer.register_forward_hook(self._hook(key)))

    def detach(self) -> None:
        """Take the updates off the language model."""
        while self.handles:
            self.handles.pop().remove()

    def _hook(self, key: str) -> Any:
        def add_update(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden = self.dropout(inputs[0].to(self.down[key].dtype))
            update = F.linear(F.linear(hidden, self.down[key]), self.up[key])
            return output + (self.scale * update).to(output.dtype)

        return add_update


def _widths(layer: nn.Module) -> tuple[int, int] | None:
    """(I, O) of a linear layer, None for any other module."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D":  # GPT-2's linear layer, whose weight is [I, O]
        width_in, width_out = cast(Tensor, layer.weight).shape
        return width_in, width_out
    return None
