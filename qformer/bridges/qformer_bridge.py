"""A bridge around one Q-Former, with its text branch: what the bridges after BLIP-2 share.

Dimensions: B batch, F frames, P image tokens, V encoder width, Q queries, D hidden width, G = B * F, T text tokens, S
texts a clip.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qformer.attention import KeyValue
from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.frames import join_frames
from qformer.bridges.protocol import BridgeInput, BridgeText, Keys, Percept, TextBridge
from qformer.bridges.reading import PassBlock, Passes, Reading
from qformer.config import QFormerConfig
from qformer.model import QFormer, check_text


class QFormerBridge(TextBridge):
    """Queries of one Q-Former read every frame by itself, or what a subclass makes of all frames.

    Args:
        config: Config of this bridge.
        qformer: Shapes of the Q-Former of one image, and of its text branch if any.
        reader: Shapes of the Q-Former whose outputs are read; None: the same.
    """

    def __init__(self, config: BaseBridgeConfig, qformer: QFormerConfig, reader: QFormerConfig | None = None) -> None:
        super().__init__(config, qformer)
        self.qformer = QFormer(reader or qformer)
        self.vocab_size = qformer.vocab_size

    @property
    def reads_text(self) -> bool:
        """Whether there is a text branch."""
        return self.qformer.config.has_text_branch

    @property
    def image_qformer(self) -> QFormer | None:
        """The Q-Former itself, where it reads the encoder's tokens."""
        return self.qformer

    def frozen_parts(self, *, is_whole: bool) -> Mapping[str, nn.Module]:
        """The Q-Former whose outputs are read, where nothing of the bridge is trained."""
        return {"qformer": self.qformer} if is_whole else {}

    def freeze_unread_text(self) -> None:
        """Freeze the last layer's feed-forward of text, whose outputs nothing reads."""
        if (unread := self.qformer.layers[-1].text_ffn) is not None:
            unread.requires_grad_(False)

    def keys(self, percept: Percept) -> Keys:
        """Keys and values of the cross-attention of every frame."""
        tokens_BFPV = percept.tokens_BFPV
        layers = self.qformer.image_key_values(tokens_BFPV.flatten(0, 1))
        return Keys(layers, tokens_BFPV.shape[1], percept.is_token, percept.is_frame_BF)

    def read_keys(self, keys: Keys, given: BridgeInput) -> Reading:
        """Queries over every frame, each together with the clip's text where there is one."""
        cache: list[KeyValue] = []
        if given.text is None:
            queries = self.qformer.forward_queries(keys.layers, keys.is_token)
            hidden_GQD, cache = queries.hidden_BQD, queries.cache
        else:
            self._check_text(given.text, keys.num_clips)
            ids_GT, is_text_GT = (one.repeat_interleave(keys.num_frames, 0) for one in given.text)
            hidden_GQD = self.qformer.forward_joint(keys.layers, ids_GT, is_text_GT, is_image=keys.is_token)
        hidden_BFQD = hidden_GQD.unflatten(0, (-1, keys.num_frames))
        block = PassBlock(len(hidden_BFQD), keys.num_frames, is_frame_BF=keys.is_frame_BF)
        pooled_BSQD, is_read_BSQ = self.pooled(hidden_BFQD, keys.is_frame_BF)
        return Reading(pooled_BSQD, is_read_BSQ, Passes(hidden_GQD, (block,)), cache)

    def pooled(self, hidden_BFQD: Tensor, is_frame_BF: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Query outputs as they are read further, and which are read: by default those of all real frames."""
        if is_frame_BF is None:
            return hidden_BFQD, None
        return hidden_BFQD, is_frame_BF[:, :, None].expand(hidden_BFQD.shape[:3])

    def read_pairs(self, keys: Keys, text: BridgeText, given: BridgeInput, negatives: Keys | None = None) -> Passes:
        """Queries and text together over one set of keys and values a frame."""
        clips, frames = keys.num_clips, keys.num_frames
        num_negatives = 0 if negatives is None else negatives.num_clips
        texts = (len(text.ids_BT) - num_negatives) // clips

        def by_frame(rows_RT: Tensor) -> Tensor:
            """All texts of every frame in turn, then those of every negative frame."""
            own_RT, other_RT = rows_RT.split([clips * texts, num_negatives])
            own_GST = own_RT.unflatten(0, (clips, texts)).repeat_interleave(frames, 0)
            return torch.cat([own_GST.flatten(0, 1), other_RT.repeat_interleave(frames, 0)])

        blocks = [PassBlock(clips, frames, texts, keys.is_frame_BF)]
        if negatives is not None:
            blocks.append(PassBlock(num_negatives, frames, is_frame_BF=negatives.is_frame_BF))
        hidden_GQD = self.qformer.forward_joint(
            keys.layers,
            by_frame(text.ids_BT),
            by_frame(text.is_text_BT),
            None if negatives is None else negatives.layers,
            keys.is_token,
            None if negatives is None else negatives.is_token,
        )
        return Passes(hidden_GQD, tuple(blocks))

    def read_text(self, text: BridgeText) -> Tensor:
        """[CLS] of the text branch."""
        return self.qformer.forward_text(*text, is_cls_only=True)

    def decode_text(self, text: BridgeText, reading: Reading) -> Tensor:
        """Text against the cached keys and values of all frames' queries."""
        (block,) = reading.passes.blocks
        cache = [KeyValue(*(join_frames(states, block.frames) for states in one)) for one in reading.cache]
        queries, is_frame_BF = reading.passes.hidden_GQD.shape[1], block.is_frame_BF
        is_query_BN = None if is_frame_BF is None else is_frame_BF.repeat_interleave(queries, dim=1)
        return self.qformer.decode_text(*text, cache, is_query_BN)

    def _check_text(self, text: BridgeText, clips: int) -> None:
        check_text(*text)
        if len(text.ids_BT) != clips:
            raise ValueError(f"{len(text.ids_BT)} instructions for {clips} images; give every image one")
