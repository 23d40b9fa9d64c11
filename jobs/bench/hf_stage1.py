"""Stage 1 as LAVIS schedules it, composed from Hugging Face's Q-Former layers: the peer of the `stage1` benchmark.

Three passes: queries over the image (whose self-attention keys and values ITG reuses), text alone padded to
`TEXT_LENGTH`, and ITM over 3B image-text pairs whose image tokens are copied and projected anew for every pair. The
language-model head runs at every position. One process.

Dimensions: B batch, P image tokens, V encoder width, Q queries, T text tokens, S rows of a pass, D hidden width,
H heads, K head width, E joint embedding width, R pairs.
Reference: LAVIS `blip2_qformer.py`, `Qformer.py`; BLIP-2 (arXiv:2301.12597), section 3.2.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qformer.bridges.qformer_bridge import QFormerBridge
from qformer.bridges.reading import PassBlock, Passes
from qformer.conversion.names import HF_RETRIEVAL, layout_name
from qformer.objectives import LABEL_SMOOTHING, Negatives
from qformer.objectives.stage1 import Stage1, Stage1Batch, Stage1Losses
from qformer.torch_build.torchvision import import_torchvision

TEXT_LENGTH = 32
_TABLE = {
    **HF_RETRIEVAL,
    "vision_norm": "vision_norm",
    "temperature": "temperature",
    **{f"qformer.{name}": name for name in ("lm_dense", "lm_norm", "lm_bias")},
}
"""Names in this module by our names: Hugging Face's, with additions for what its layout lacks."""


class HuggingFaceStage1(nn.Module):
    """The reference schedule with the weights of `ours`; losses reduced as by LAVIS in one process.

    Args:
        ours: Source of weights and shapes.
        attention: Hugging Face attention implementation, "sdpa" or "eager".
        has_weights: False where `ours` lies on the meta device: shapes alone are taken.
    """

    def __init__(self, ours: Stage1, *, attention: str = "sdpa", has_weights: bool = True) -> None:
        super().__init__()
        import_torchvision()
        from transformers import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

        assert isinstance(ours.bridge, QFormerBridge)
        shape = ours.bridge.qformer.config
        config = Blip2QFormerConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            hidden_dropout_prob=shape.dropout,
            attention_probs_dropout_prob=shape.dropout,
            max_position_embeddings=shape.max_positions,
            layer_norm_eps=shape.layer_norm_eps,
            cross_attention_frequency=shape.cross_attention_frequency,
            encoder_hidden_size=shape.encoder_width,
            use_qformer_text_input=True,
            attn_implementation=attention,
        )
        self.vision_norm = nn.LayerNorm(shape.encoder_width, eps=shape.vision_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(ours.bridge.qformer.query_tokens.shape))
        self.embeddings = Blip2TextEmbeddings(config)
        self.qformer = Blip2QFormerModel(config)
        self.vision_projection = nn.Linear(shape.hidden_size, shape.embed_dim)
        self.text_projection = nn.Linear(shape.hidden_size, shape.embed_dim)
        self.itm_head = nn.Linear(shape.hidden_size, 2)
        self.temperature = nn.Parameter(torch.ones(()))
        self.lm_dense = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.lm_norm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.lm_bias = nn.Parameter(torch.zeros(shape.vocab_size))
        if has_weights:
            self.load_state_dict({their_name(name): tensor for name, tensor in ours.state_dict().items()})

    def forward(self, batch: Stage1Batch, negatives: Negatives) -> Stage1Losses:
        """All losses of one step; text is padded to `TEXT_LENGTH`, every sample is an image and valid."""
        image_BPV = self.vision_norm(batch.image_BFPV[:, 0])
        extra = TEXT_LENGTH - batch.input_ids_BT.shape[1]
        ids_BT = F.pad(batch.input_ids_BT, (0, extra))
        mask_BT = F.pad(batch.is_text_BT.long(), (0, extra))
        query_BQD, cache = self._query_pass(image_BPV)
        text_BTD = self.qformer(self.embeddings(ids_BT), query_length=0, attention_mask=mask_BT).last_hidden_state
        itc = self._itc(query_BQD, text_BTD[:, 0])
        itm = self._itm(image_BPV, ids_BT, mask_BT, negatives)
        itg = self._itg(ids_BT, mask_BT, cache)
        passes = Passes(query_BQD, (PassBlock(len(query_BQD), frames=1),))
        return Stage1Losses({"itc": itc, "itm": itm, "itg": itg}, passes)

    def _query_pass(self, image_BPV: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Queries over the image; also caches the keys and values of self-attention."""
        cache: list[dict[str, Tensor]] = [{} for _ in self.qformer.encoder.layer]
        handles = []
        for layer_cache, layer in zip(cache, self.qformer.encoder.layer, strict=True):
            for name in ("key", "value"):
                projection = getattr(layer.attention.attention, name)

                def store(
                    module: nn.Module,
                    inputs: Any,
                    output: Tensor,
                    layer_cache: dict[str, Tensor] = layer_cache,
                    name: str = name,
                ) -> None:
                    layer_cache[name] = output

                handles.append(projection.register_forward_hook(store))
        queries_BQD = self.query_tokens.expand(image_BPV.shape[0], -1, -1)
        hidden_BQD = self.qformer(queries_BQD, encoder_hidden_states=image_BPV).last_hidden_state
        for handle in handles:
            handle.remove()
        return hidden_BQD, cache

    def _itc(self, query_BQD: Tensor, cls_BD: Tensor) -> Tensor:
        queries_BQE = F.normalize(self.vision_projection(query_BQD), dim=-1)
        text_BE = F.normalize(self.text_projection(cls_BD), dim=-1)
        scores_BB = torch.einsum("bqe,ne->bnq", queries_BQE, text_BE).amax(dim=-1) / self.temperature
        target_B = torch.arange(len(text_BE), device=text_BE.device)
        one_way = F.cross_entropy(scores_BB, target_B, label_smoothing=LABEL_SMOOTHING)
        return (one_way + F.cross_entropy(scores_BB.T, target_B, label_smoothing=LABEL_SMOOTHING)) / 2

    def _itm(self, image_BPV: Tensor, ids_BT: Tensor, mask_BT: Tensor, negatives: Negatives) -> Tensor:
        image_RPV = torch.cat([image_BPV, image_BPV[negatives.image_B], image_BPV])
        ids_RT = torch.cat([ids_BT, ids_BT, ids_BT[negatives.text_B]])
        mask_RT = torch.cat([mask_BT, mask_BT, mask_BT[negatives.text_B]])
        queries_RQD = self.query_tokens.expand(len(ids_RT), -1, -1)
        num_queries = queries_RQD.shape[1]
        hidden_RSD = self.qformer(
            self.embeddings(ids_RT, query_embeds=queries_RQD),
            query_length=num_queries,
            attention_mask=torch.cat([mask_RT.new_ones(queries_RQD.shape[:2]), mask_RT], dim=1),
            encoder_hidden_states=image_RPV,
        ).last_hidden_state
        logits_R2 = self.itm_head(hidden_RSD[:, :num_queries]).mean(dim=1)
        is_match_R = torch.arange(len(ids_RT), device=ids_RT.device) < len(ids_BT)
        return F.cross_entropy(logits_R2, is_match_R.long())

    def _itg(self, ids_BT: Tensor, mask_BT: Tensor, cache: list[dict[str, Tensor]]) -> Tensor:
        """Text alone over the cached keys and values, then the head at all positions."""
        decoder_ids_BT = ids_BT.clone()
        decoder_ids_BT[:, 0] = len(self.lm_bias) - 1
        hidden_BTD = self.qformer.dropout(self.qformer.layernorm(self.embeddings(decoder_ids_BT)))
        length, num_queries = ids_BT.shape[1], self.query_tokens.shape[1]
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=ids_BT.device).tril()
        text_BTT = causal_TT & mask_BT.bool()[:, None, :]
        mask_B1TS = F.pad(text_BTT, (num_queries, 0), value=True)[:, None]
        for layer, past in zip(self.qformer.encoder.layer, cache, strict=True):
            attention = layer.attention.attention

            def heads(rows_BSD: Tensor, width: int = attention.attention_head_size) -> Tensor:
                return rows_BSD.unflatten(-1, (-1, width)).transpose(1, 2)

            attended_BHTK = F.scaled_dot_product_attention(
                heads(attention.query(hidden_BTD)),
                heads(torch.cat([past["key"], attention.key(hidden_BTD)], dim=1)),
                heads(torch.cat([past["value"], attention.value(hidden_BTD)], dim=1)),
                attn_mask=mask_B1TS,
                dropout_p=attention.attention_dropout if self.training else 0.0,
            )
            hidden_BTD = layer.attention.output(attended_BHTK.transpose(1, 2).flatten(2), hidden_BTD)
            hidden_BTD = layer.feed_forward_chunk(hidden_BTD)
        hidden_BTD = self.lm_norm(F.gelu(self.lm_dense(hidden_BTD)))
        logits_BTV = F.linear(hidden_BTD, self.embeddings.word_embeddings.weight, self.lm_bias)
        labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
        return F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING
        )


def their_name(name: str) -> str:
    """Name in this module of one of our parameters."""
    return cast(str, layout_name(name, _TABLE))
