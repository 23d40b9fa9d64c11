"""Initialisation of the demo's language model: attention that looks up facts, which training then refines.

To name a fact, the model finds the slot that holds the last generated word ("red") and copies another fact of that slot
(a shape). A transformer of this size learns this lookup only after thousands of steps. Before that it memorises which
pairs exist, and then cannot name a new pair. The initialisation costs nothing later: all weights stay trainable.

Dimensions: V vocabulary, N = V + parts, D width.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.demo.backbones.facts import NUM_BINS
from jobs.demo.backbones.language_batches import MADE_UP_COLOURS, MADE_UP_SHAPES
from jobs.demo.world.scenes import COLOURS, SHAPES, SIZES

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EMBEDDING_STD = 0.5
"""Roughly the standard deviation of a linear layer's output after a layer norm, such as the output of a bridge."""
OUTPUT_STD = 0.06
FACT_SHARE = 0.5
VALUES_OF_KIND = {
    "size": SIZES,
    "colour": (*COLOURS, *MADE_UP_COLOURS),
    "shape": (*SHAPES, *MADE_UP_SHAPES),
}
_QUERY_GAIN = 8.0
_COPY_GAIN = 0.7
_NUM_LOOKUP_HEADS = 2
# Rotary frequencies before this index rotate too far between caption and prompt to compare contents.
_FIRST_SLOW_FREQUENCY = 5


def mix_facts(tokenizer: "PreTrainedTokenizerFast", width: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Compose the embeddings of fact tokens from parts.

    `<red>` is the sum of the value "red" and the kind "colour", `<x3>` of the value "x3" and the kind "place". Words
    are not composed.

    Returns:
        mixing_VN over the V words followed by the parts, the trainable parts, and each part's row in them.
    """
    id_of_token = tokenizer.get_vocab()
    kind_of_value = {value: kind for kind, values in VALUES_OF_KIND.items() for value in values}
    kind_of_value |= {f"{axis}{index}": f"place {axis}" for axis in "xy" for index in range(NUM_BINS)}
    parts_of_token = {
        id_of_token[f"<{value}>"]: (f"kind {kind}", f"value {value}")
        for value, kind in kind_of_value.items()
        if f"<{value}>" in id_of_token
    }
    names = sorted({name for parts in parts_of_token.values() for name in parts})
    row_of_part = {name: row for row, name in enumerate(names)}
    mixing_VN = torch.eye(len(id_of_token), len(id_of_token) + len(names))
    for index, parts in parts_of_token.items():
        mixing_VN[index] = 0
        mixing_VN[index, [len(id_of_token) + row_of_part[name] for name in parts]] = FACT_SHARE
    return mixing_VN, EMBEDDING_STD * torch.randn(len(names), width), row_of_part


@torch.no_grad()
def init_lookup(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    parts_ND: Tensor,
    row_of_part: dict[str, int],
) -> None:
    """Set the model's embeddings, and the attention of the first two layers to the lookup."""
    id_of_token = tokenizer.get_vocab()
    words_VD, output_VD = model.get_input_embeddings().weight, model.lm_head.weight
    words_VD.normal_(std=EMBEDDING_STD)
    output_VD.copy_(words_VD * (OUTPUT_STD / EMBEDDING_STD))
    find_value = torch.zeros(words_VD.shape[1], words_VD.shape[1])
    for value in (value for values in VALUES_OF_KIND.values() for value in values):
        part_D = parts_ND[row_of_part[f"value {value}"]]
        output_VD[id_of_token[value]] = part_D * (OUTPUT_STD / EMBEDDING_STD)
        find_value += _map(words_VD[id_of_token[value]], part_D)
        # In the second layer, facts found for the words before help to find the same slot again.
        find_value += 0.5 * _map(part_D, part_D)
    for layer in model.model.layers[:2]:
        _look_up(layer.self_attn, find_value)


def _map(source_D: Tensor, target_D: Tensor) -> Tensor:
    """Return the matrix that maps the source to the target and everything orthogonal to zero."""
    return torch.outer(target_D, source_D) / source_D.square().sum()


def _look_up(attention: Any, find_DD: Tensor) -> None:
    """Make some heads attend to keys similar to the query mapped by `find_DD`, and all heads copy their input."""
    head_dim = int(attention.head_dim)
    rows = torch.arange(_NUM_LOOKUP_HEADS * head_dim)
    keys, queries = attention.k_proj.weight, attention.q_proj.weight
    keys[rows[rows % (head_dim // 2) < _FIRST_SLOW_FREQUENCY]] *= 0.2
    queries[rows] = _QUERY_GAIN * keys[rows] @ find_DD
    torch.nn.init.orthogonal_(attention.v_proj.weight, gain=_COPY_GAIN)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)
