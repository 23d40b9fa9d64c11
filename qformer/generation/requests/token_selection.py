"""The next token of each row: greedy, or sampled with the request's own random generator.

Order and meaning are those of `transformers` generate: repetition penalty, shortest length, suppressed tokens, then
temperature and nucleus.

Dimensions: N rows, V vocabulary, C tokens by descending probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qformer.errors import UserError
from qformer.generation.requests.request import RequestSettings

NOT_FINITE = -1
"""Value in place of a token where the logits have NaN or infinity."""
_UNSUPPORTED = (
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "remove_invalid_values",
)
"""Settings of a model's generation_config that `LanguageModel.generate` supports and the engine does not."""


class TokenRow(Protocol):
    """The state of a row that decides its next token."""

    settings: RequestSettings
    generator: torch.Generator
    num_inputs: int

    @property
    def ids(self) -> list[int]:
        """Generated tokens so far."""


@dataclass(frozen=True, slots=True)
class GenerationRules:
    """Rules of the model's own generation_config for every answer."""

    end_ids: tuple[int, ...]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]
    min_length: int
    """Minimum length before an end token, including a decoder's input and an encoder-decoder's start token."""
    min_new_tokens: int
    is_encoder_decoder: bool
    start_id: int | None
    """Start token of an encoder-decoder, to which the repetition penalty applies; None for a decoder."""

    @classmethod
    def of(cls, model: Any, end_ids: Sequence[int], is_encoder_decoder: bool) -> "GenerationRules":
        """Read a model's rules.

        Raises:
            UserError: If it has one that the engine does not support.
        """
        config = model.generation_config
        unsupported = [name for name in _UNSUPPORTED if getattr(config, name, None) not in (None, False)]
        unsupported += ["guidance_scale"] if getattr(config, "guidance_scale", None) not in (None, 1) else []
        if unsupported:
            raise UserError(
                f"the language model's generation_config sets {', '.join(unsupported)}, which the engine does not "
                "support; remove it from the model's generation_config.json"
            )
        return cls(
            end_ids=tuple(end_ids),
            suppressed=tuple(config.suppress_tokens or ()),
            suppressed_first=tuple(config.begin_suppress_tokens or ()),
            min_length=config.min_length or 0,
            min_new_tokens=config.min_new_tokens or 0,
            is_encoder_decoder=is_encoder_decoder,
            start_id=start_id(model) if is_encoder_decoder else None,
        )

    @property
    def are_inactive(self) -> bool:
        """Whether they change no logits."""
        return not (self.suppressed or self.suppressed_first or self.min_length or self.min_new_tokens)

    def least_new_tokens(self, num_inputs: int) -> int:
        """Minimum number of new tokens before an end token."""
        counted = 1 if self.is_encoder_decoder else num_inputs
        return self.min_new_tokens or max(0, self.min_length - counted)


def select_tokens(logits_NV: Tensor, rows: Sequence[TokenRow], rules: GenerationRules) -> list[int]:
    """Select a token for each row; `NOT_FINITE` where the logits are not finite."""
    is_good_N = logits_NV.sum(dim=-1, dtype=torch.float32).isfinite()
    changed = [
        place for place, row in enumerate(rows) if not rules.are_inactive or row.settings.repetition_penalty != 1.0
    ]
    drawn = [place for place, row in enumerate(rows) if row.settings.temperature > 0.0]
    if changed or drawn:
        logits_NV = logits_NV.float()
    for place in changed:
        logits_NV[place] = _processed(logits_NV[place], rows[place], rules)
    chosen_N = logits_NV.argmax(dim=-1)
    if drawn:
        drawn_N = torch.tensor(drawn, device=logits_NV.device)
        chosen_N[drawn_N] = _draw(logits_NV[drawn_N], [rows[place] for place in drawn])
    return [int(token) for token in chosen_N.where(is_good_N, NOT_FINITE).tolist()]


def _processed(logits_V: Tensor, row: TokenRow, rules: GenerationRules) -> Tensor:
    logits_V, ids = logits_V.clone(), row.ids
    penalty = row.settings.repetition_penalty
    penalised = ids if rules.start_id is None else [rules.start_id, *ids]
    if penalty != 1.0 and penalised:
        penalised_ids = torch.tensor(sorted(set(penalised)), device=logits_V.device)
        values = logits_V[penalised_ids]
        logits_V[penalised_ids] = torch.where(values < 0, values * penalty, values / penalty)
    if len(ids) < rules.least_new_tokens(row.num_inputs):
        logits_V[list(rules.end_ids)] = -torch.inf
    if rules.suppressed:
        logits_V[list(rules.suppressed)] = -torch.inf
    if rules.suppressed_first and not ids:
        logits_V[list(rules.suppressed_first)] = -torch.inf
    return logits_V


def _draw(logits_NV: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """Sample by the inverse of the cumulative probabilities at one random number a row.

    A temperature or `top_p` too small for fp32 leaves the most likely token only.
    """
    temperature_N = torch.tensor([row.settings.temperature for row in rows], device=logits_NV.device)
    temperature_N = temperature_N.clamp_min(torch.finfo(torch.float32).tiny)
    logits_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)  # else the division may give inf - inf
    top_p_N = torch.tensor([row.settings.top_p for row in rows], device=logits_NV.device)
    probability_NC, token_NC = (logits_NV / temperature_N[:, None]).softmax(dim=-1).sort(dim=-1, descending=True)
    before_NC = probability_NC.cumsum(dim=-1) - probability_NC
    is_tail_NC = before_NC >= top_p_N[:, None]
    is_tail_NC[:, 0] = False
    probability_NC = probability_NC.masked_fill(is_tail_NC, 0.0)
    sum_NC = probability_NC.cumsum(dim=-1)
    # On the CPU for every device, so that the same seed draws the same numbers everywhere.
    random_N = torch.cat([torch.rand(1, generator=row.generator) for row in rows]).to(logits_NV.device)
    place_N = torch.searchsorted(sum_NC, (random_N * sum_NC[:, -1])[:, None], right=True)
    last_N = (probability_NC > 0).sum(dim=-1, keepdim=True) - 1
    return token_NC.gather(1, place_N.minimum(last_N))[:, 0]


def start_id(model: Any) -> int:
    """Start token of an encoder-decoder's answers."""
    config = model.generation_config
    start = config.decoder_start_token_id
    return int(config.bos_token_id if start is None else start)
