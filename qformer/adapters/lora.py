"""Low-rank updates of a frozen language model, by peft; their weights belong to the bridge, the model keeps its own.

peft wraps the chosen linear layers. Its two matrices a layer are trained, saved and loaded here, among the bridge's
trainables; `own_weights` shows the language model without them, by the names and bytes it came with.

Dimensions: I input width, O output width, R rank.
Reference: LoRA (arXiv:2106.09685), section 4.1.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from qformer.config import LoraConfig
from qformer.errors import UserError

_ADAPTER = "default"


class Lora(nn.Module):
    """The low-rank updates of one language model, attached on construction: y = W x + alpha / R * up (down x).

    Args:
        language_model: Any module with linear layers of the targets' names (`nn.Linear`, or GPT-2's `Conv1D`).
        config: Rank, scale, dropout and target layers.

    Raises:
        UserError: If no layer has a target's name, or one that has is not linear.
    """

    down: nn.ParameterDict
    """[R, I] of each layer, shared with its adapter, float32; layer names have slashes instead of dots."""
    up: nn.ParameterDict
    """[O, R] of each layer, zero before training, so that an untrained update changes nothing."""

    def __init__(self, language_model: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        modules = dict(language_model.named_modules())
        linear = {n for n, m in modules.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        chosen = {n for n in modules if f".{n}".endswith(tuple(f".{target}" for target in config.targets))}
        if not chosen or chosen - linear:
            available, wrong = ({name.rpartition(".")[2] for name in names} for names in (linear, chosen - linear))
            what = f"name {sorted(wrong)}, no linear layers" if wrong else "name no layer"
            raise UserError(
                f"model.lora.targets={list(config.targets)} {what}; the model's linear layers are {sorted(available)}"
            )
        adapter = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
            fan_in_fan_out=any(type(modules[name]).__name__ == "Conv1D" for name in chosen),
        )
        inject_adapter_in_model(adapter, language_model, adapter_name=_ADAPTER)
        adapted = {name: layer for name, layer in language_model.named_modules() if hasattr(layer, "lora_A")}
        # A list hides the model from nn.Module: the wrapped layers belong to the language model.
        self._model, self._adapted = [language_model], cast(dict[str, Any], adapted)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in self._adapted.items():
            key = name.replace(".", "/")  # parameter names cannot hold dots
            self.down[key] = layer.lora_A.float()[_ADAPTER].weight
            self.up[key] = layer.lora_B.float()[_ADAPTER].weight
        self.train()

    def train(self, mode: bool = True) -> "Lora":
        """Switch the updates' dropout; the language model itself stays in eval mode."""
        for layer in self._adapted.values():
            layer.lora_dropout.train(mode)
        return super().train(mode)

    def merge(self) -> dict[str, Tensor]:
        """Add the updates to the model's weights, for export, and return all of them by the model's own names."""
        with torch.no_grad():
            for layer in self._adapted.values():
                layer.merge(safe_merge=True)
        return own_weights(self._model[0])

    def detach(self) -> None:
        """Remove the updates from the language model, which is then as it was before."""
        for name, layer in self._adapted.items():
            parent, _, last = name.rpartition(".")
            setattr(self._model[0].get_submodule(parent), last, layer.get_base_layer())
        del self._model[0].peft_config


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by the names they have without updates, which are left out."""
    state = model.state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
