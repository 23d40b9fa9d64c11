"""The seam between frozen tokens and the two stages: what a bridge is given, and what it does.

A stage calls `perceive` and `read`; stage 1 also calls what `TextBridge` adds. Nothing outside `qformer.bridges` asks
which bridge it has. State never lies on a module: a bridge that reads frame by frame is a `StreamingBridge`, and its
state goes in and comes out.

Dimensions: B batch, F frames, P tokens of a frame, V width of what is read, Q queries, D bridge width, T text tokens, M
packed text tokens, G = B * F, R image-text pairs, E chosen clips.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from qformer.attention import KeyValue
from qformer.bridges.audio_branch import Sound
from qformer.bridges.config import BaseBridgeConfig
from qformer.bridges.reading import Passes, Reading
from qformer.config import QFormerConfig
from qformer.model import QFormer, check_image

StateT = TypeVar("StateT")


class BridgeText(NamedTuple):
    """Text in the bridge's own vocabulary, one a sample or pair."""

    ids_BT: Tensor
    is_text_BT: Tensor
    """True at real tokens."""

    def rows(self, part: slice) -> "BridgeText":
        """The texts of some samples."""
        return BridgeText(self.ids_BT[part], self.is_text_BT[part])


class BridgeInput(NamedTuple):
    """Everything that a bridge may read of a batch."""

    tokens_BFPV: Tensor
    """Frozen encoder tokens; an image is a clip of one frame."""
    is_frame_BF: Tensor | None = None
    """False at frames that are padding, at least one of each clip being none; None: none is."""
    text: BridgeText | None = None
    """Instruction, for a bridge that `reads_text`."""
    sound: Sound | None = None
    """What the audio encoder made, for a bridge that `takes_joint_audio`."""
    draw: int = 0
    """Random key of the step, the same on every rank."""
    is_valid_B: Tensor | None = None
    """False at rows that only fill a batch, or whose media could not be read: they count for no loss; None: all do."""


class Percept(NamedTuple):
    """What queries cross-attend to; ranks exchange single rows of it."""

    tokens_BFPV: Tensor
    """F is 1 where the frames were joined."""
    is_token: Tensor | None = None
    """Joined frames: the tokens that queries may attend to, [B, P], or [B, Q, P] where each query has its own."""
    is_frame_BF: Tensor | None = None
    """Separate frames: False at padding; None where there is none."""


class Keys:
    """A percept as query passes attend to it; computed once for all of them.

    Args:
        layers: Keys and values of the cross-attention of each layer, over B * F frames; None without cross-attention.
        num_frames: F.
        is_token: Mask of `Percept.is_token`.
        is_frame_BF: Mask of `Percept.is_frame_BF`.
    """

    def __init__(
        self,
        layers: Sequence[KeyValue | None],
        num_frames: int,
        is_token: Tensor | None = None,
        is_frame_BF: Tensor | None = None,
    ) -> None:
        self.layers, self.num_frames = list(layers), num_frames
        self.is_token, self.is_frame_BF = is_token, is_frame_BF

    @property
    def num_clips(self) -> int:
        """B."""
        return next(len(kv.keys_BHNK) for kv in self.layers if kv is not None) // self.num_frames

    def take(self, other: "Keys | None", place_E: Tensor, masks: "Masks") -> "Keys":
        """Those of some clips, one copy for each.

        Args:
            other: Further clips, counted behind these.
            place_E: Clips wanted.
            masks: Masks of the selected clips.
        """
        layers, frames = self.layers, self.num_frames
        if other is not None:
            pairs = zip(layers, other.layers, strict=True)
            layers = [own and theirs and own.concatenate(theirs, dim=0) for own, theirs in pairs]
        place_G = (place_E[:, None] * frames + torch.arange(frames, device=place_E.device)).flatten()
        return Keys([None if kv is None else kv.take(place_G) for kv in layers], frames, *masks)


class Masks(NamedTuple):
    """Masks of a percept's clips."""

    is_token: Tensor | None
    is_frame_BF: Tensor | None


class WeightStart(NamedTuple):
    """Weights of another bridge by the names of the one that they start."""

    weights: dict[str, Tensor]
    new: Sequence[str] = ()
    """Parts of names that the source cannot have."""
    dropped: Sequence[str] = ()
    """Parts of the source's names that this bridge has no place for."""


class Bridge(nn.Module, ABC):
    """All that stands between frozen tokens and a stage: stage 2 needs no more than this.

    Parameters lie in submodules, never on the bridge itself: a stage takes the submodules over, so that checkpoints
    name them without a prefix.

    Args:
        config: Config of this bridge.
        qformer: Shapes of the Q-Former of one image; width of the encoder's tokens, and of the query outputs.
    """

    config: BaseBridgeConfig

    def __init__(self, config: BaseBridgeConfig, qformer: QFormerConfig) -> None:
        super().__init__()
        self.config, self.shape = config, qformer
        self.vision_norm = nn.LayerNorm(qformer.encoder_width, eps=qformer.vision_norm_eps)

    @abstractmethod
    def read(self, percept: Percept, given: BridgeInput) -> Reading:
        """Query outputs of a percept, together with `given.text` where there is one."""

    def perceive(self, given: BridgeInput) -> Percept:
        """What is read of clips; by default every frame by itself."""
        return Percept(self.normed(given), is_frame_BF=given.is_frame_BF)

    def normed(self, given: BridgeInput) -> Tensor:
        """Encoder tokens behind the norm, [B, F, P, V], without what padding frames hold."""
        tokens_BFPV = given.tokens_BFPV
        if given.is_frame_BF is not None:
            # NaN in them would live through a weight of zero.
            tokens_BFPV = tokens_BFPV.masked_fill(~given.is_frame_BF[:, :, None, None], 0.0)
        return self.vision_norm(tokens_BFPV)

    @property
    def reads_text(self) -> bool:
        """Whether `read` needs `BridgeInput.text`."""
        return False

    @property
    def image_qformer(self) -> QFormer | None:
        """The Q-Former that reads the encoder's tokens, which a BERT may start."""
        return None

    def frozen_parts(self, *, is_whole: bool) -> Mapping[str, nn.Module]:
        """Parts that stay as they were loaded, by the name under which a run records their digest.

        Args:
            is_whole: Whether the run trains nothing of the bridge; else what the config alone keeps.
        """
        return {"bridge": self} if is_whole else {}

    def freeze_unread_text(self) -> None:
        """Freeze weights of the text branch that have no gradient where query outputs alone are read."""

    def start_from(self, weights: Mapping[str, Tensor], source: BaseBridgeConfig) -> WeightStart | None:
        """Another bridge's weights by the names of this one; None where that bridge cannot start this one.

        Args:
            weights: Weights of the source's bridge, without the heads of its stage.
            source: Config of that bridge.
        """
        is_alike = type(source) is type(self.config) or (source.is_image_qformer and self.config.is_image_qformer)
        return WeightStart(dict(weights)) if is_alike else None

    def check(self, tokens_BFPV: Tensor, is_frame_BF: Tensor | None = None) -> None:
        """Refuse encoder tokens that do not fit, and a mask of other frames.

        Raises:
            ValueError: Naming both sides.
        """
        check_image(tokens_BFPV, self.shape.encoder_width, self.vision_norm.weight.dtype, "BFPV")
        if is_frame_BF is None:
            return
        if is_frame_BF.shape != tokens_BFPV.shape[:2] or is_frame_BF.dtype != torch.bool:
            raise ValueError(
                f"the mask of frames is {is_frame_BF.dtype} {tuple(is_frame_BF.shape)} but the image tokens are "
                f"{tuple(tokens_BFPV.shape)}; give every frame of every clip one torch.bool"
            )
        if not is_frame_BF.any(dim=1).all():
            raise ValueError("a clip has no frame that is not padding; leave the clip out, or mark its first frame")


class TextBridge(Bridge):
    """A bridge that stage 1 can train: queries and text share it, and one set of keys serves several passes."""

    vocab_size: int
    """Ids of its text, [DEC] being the last; 0 without text branch."""

    @abstractmethod
    def keys(self, percept: Percept) -> Keys:
        """What the passes over a percept share."""

    @abstractmethod
    def read_keys(self, keys: Keys, given: BridgeInput) -> Reading:
        """`read`, of keys."""

    def read(self, percept: Percept, given: BridgeInput) -> Reading:
        """See `Bridge.read`."""
        return self.read_keys(self.keys(percept), given)

    @abstractmethod
    def read_pairs(self, keys: Keys, text: BridgeText, given: BridgeInput, negatives: Keys | None = None) -> Passes:
        """Query outputs of clips together with texts (ITM).

        Args:
            keys: Clips.
            text: Equally many for each clip, clip by clip, then one for each of `negatives`.
            given: The batch of the clips.
            negatives: Further clips.
        """

    @abstractmethod
    def read_text(self, text: BridgeText) -> Tensor:
        """The text's first token, read without a clip: [B, D] (ITC)."""

    @abstractmethod
    def decode_text(self, text: BridgeText, reading: Reading) -> Tensor:
        """Causal text over the clips' query outputs (ITG): next-token logits of the real tokens, [M, vocab]."""


class StreamingBridge(Bridge, Generic[StateT]):
    """A bridge that reads frame by frame: memory banks, causal windows. What it has read so far is its `StateT`."""

    @abstractmethod
    def begin(self, clips: int, given: BridgeInput) -> StateT:
        """State before the first frame."""

    @abstractmethod
    def step(
        self, frame_BPV: Tensor, is_frame_B: Tensor | None, state: StateT, given: BridgeInput
    ) -> tuple[Reading, StateT]:
        """Read one more frame of every clip; where `is_frame_B` is False, reading and state must stay as they were."""

    def read(self, percept: Percept, given: BridgeInput) -> Reading:
        """What the last frame's step gives."""
        tokens_BFPV, is_frame_BF = percept.tokens_BFPV, percept.is_frame_BF
        state, reading = self.begin(len(tokens_BFPV), given), None
        for frame, frame_BPV in enumerate(tokens_BFPV.unbind(dim=1)):
            reading, state = self.step(frame_BPV, None if is_frame_BF is None else is_frame_BF[:, frame], state, given)
        assert reading is not None, "a clip has at least one frame"
        return reading
