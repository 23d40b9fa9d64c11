"""Frozen language models that read soft prompts before their text: decoder-only and encoder-decoder.

Both have the same interface: texts become a `LanguageBatch`, a batch and soft prompts become logits and a loss, and
soft prompts and prompts become generated texts.

Dimensions: B batch, N soft-prompt rows, S rows of embedded text, T labels, L language-model width.
Reference: BLIP-2 (arXiv:2301.12597), section 3.3.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import qformer.torch_build.vector_math  # noqa: F401
from qformer.config import GenerationSettings
from qformer.errors import UserError

IGNORED = -100
"""Label that the loss ignores."""


@dataclass(frozen=True, slots=True)
class LanguageBatch:
    """Tokenised texts of a batch, right-padded."""

    input_ids_BS: Tensor
    """Ids embedded after the soft prompts: prompt and answer for a decoder, the prompt alone for an encoder."""
    is_input_BS: Tensor
    """True at real tokens."""
    labels_BT: Tensor
    """Ids to predict, `IGNORED` where there is none; T = S for a decoder."""
    num_truncated: int = 0
    """Number of truncated texts."""

    def to(self, device: torch.device) -> "LanguageBatch":
        """The same batch on `device`."""
        input_ids_BS, is_input_BS = self.input_ids_BS.to(device), self.is_input_BS.to(device)
        return LanguageBatch(input_ids_BS, is_input_BS, self.labels_BT.to(device), self.num_truncated)

    def rows(self, part: slice) -> "LanguageBatch":
        """Some of the rows."""
        return LanguageBatch(self.input_ids_BS[part], self.is_input_BS[part], self.labels_BT[part])

    def without_labels(self, is_left_out_B: Tensor) -> "LanguageBatch":
        """The same batch with some rows ignored by the loss."""
        return replace(self, labels_BT=self.labels_BT.masked_fill(is_left_out_B[:, None], IGNORED))


class LanguageModel(nn.Module, ABC):
    """A frozen Hugging Face language model with its tokenizer, behind soft prompts.

    Always in eval mode, whatever the surrounding module is switched to.

    Args:
        model: The model; its parameters stop requiring gradients.
        tokenizer: Its tokenizer, with an end token.
        max_prompt_tokens: `generate` cuts longer prompts, as training does (`tokenize`); None cuts none.

    Raises:
        UserError: If the tokenizer has no end token, or more ids than the model has embeddings.
    """

    is_encoder_decoder: bool
    end_id: int
    """Ends an answer in training: the tokenizer's end token, unless the model ends with others only."""
    end_ids: list[int]
    """Each ends an answer in generation: the tokenizer's end token and the model's own (BLIP-2's OPT: a newline)."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_prompt_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.max_prompt_tokens = tokenizer, max_prompt_tokens
        embeddings = cast(Any, model).get_input_embeddings()
        self.width: int = embeddings.embedding_dim
        if tokenizer.eos_token_id is None:
            name = tokenizer.name_or_path
            raise UserError(f"model.language: the tokenizer of {name!r} has no end token; set eos_token in its config")
        if len(tokenizer) > embeddings.num_embeddings:
            raise UserError(
                f"model.language: the tokenizer of {tokenizer.name_or_path!r} has {len(tokenizer)} ids but the model "
                f"embeds {embeddings.num_embeddings}; give the model its own tokenizer"
            )
        end = int(tokenizer.eos_token_id)
        own = [one for one in _own_end_ids(model) if one < embeddings.num_embeddings]
        self.end_id = end if end in own or not own else own[0]
        self.end_ids = sorted({end, *own})

    def train(self, mode: bool = True) -> "LanguageModel":
        """Stay in eval mode: a frozen language model drops nothing out."""
        return super().train(False)

    @abstractmethod
    def tokenize(self, prompts: Sequence[str], answers: Sequence[str], *, max_tokens: int) -> LanguageBatch:
        """Tokenise one prompt and one answer a sample; the loss counts the answer and its end token alone.

        Args:
            prompts: "" where there is none.
            answers: Texts to learn.
            max_tokens: Limit for prompt and answer each; longer ones are truncated, but keep the answer's end token.
        """

    @abstractmethod
    def logits(self, prefix_BNL: Tensor, batch: LanguageBatch, is_prefix_BN: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] after the soft prompts, but those False in `is_prefix_BN`; t predicts label t."""

    @abstractmethod
    def _generation_inputs(self, prefixes: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Embeddings and mask that generation starts from."""

    def loss(
        self, prefix_BNL: Tensor, batch: LanguageBatch, is_prefix_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the labelled tokens, as a sum and a count, so that ranks can average over all tokens."""
        logits = self.logits(prefix_BNL, batch, is_prefix_BN).flatten(0, 1).float()
        total = F.cross_entropy(logits, batch.labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, (batch.labels_BT != IGNORED).sum()

    def _embed(self, ids: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.model).get_input_embeddings()(ids))

    def _with_prefix(
        self, prefix_BNL: Tensor, batch: LanguageBatch, is_prefix_BN: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Soft prompts, then the embedded text, and the mask of both; rows left out come last, behind the padding."""
        if prefix_BNL.shape[-1] != self.width or prefix_BNL.shape[0] != len(batch.input_ids_BS):
            raise ValueError(
                f"soft prompts are {tuple(prefix_BNL.shape)} but the language model takes "
                f"[{len(batch.input_ids_BS)}, rows, {self.width}]; build Stage2 with language_width={self.width}"
            )
        embedded_BSL = self._embed(batch.input_ids_BS)
        embedded_BRL = torch.cat([prefix_BNL.to(embedded_BSL.dtype), embedded_BSL], dim=1)
        is_first_BN = batch.is_input_BS.new_ones(prefix_BNL.shape[:2]) if is_prefix_BN is None else is_prefix_BN
        is_real_BR = torch.cat([is_first_BN, batch.is_input_BS], dim=1).long()
        if is_prefix_BN is not None:
            order_BR = is_real_BR.argsort(dim=1, descending=True, stable=True)  # else they would shift the text
            embedded_BRL = embedded_BRL.gather(1, order_BR[..., None].expand_as(embedded_BRL))
            is_real_BR = is_real_BR.gather(1, order_BR)
        return {"inputs_embeds": embedded_BRL, "attention_mask": is_real_BR}

    @torch.no_grad()
    def generate(
        self, prefixes: Tensor | Sequence[Tensor], prompts: Sequence[str], settings: GenerationSettings | None = None
    ) -> list[str]:
        """Texts after soft prompts [B, N, L], or each item's own [N, L], and prompts; a batch gives what items give.

        `settings` override the model's own generation_config; its other values (suppressed tokens, a minimum length)
        stay in effect.
        """
        settings, prefixes = settings or GenerationSettings(), list(prefixes)
        device = prefixes[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            ids_BT = cast(Any, self.model).generate(
                **self._generation_inputs(prefixes, prompts),
                max_new_tokens=settings.max_new_tokens,
                do_sample=settings.top_p is not None,
                num_beams=settings.num_beams,
                length_penalty=settings.length_penalty,
                top_p=1.0 if settings.top_p is None else settings.top_p,
                top_k=0,
                temperature=settings.temperature,
                repetition_penalty=settings.repetition_penalty,
                no_repeat_ngram_size=0,
                eos_token_id=self.end_ids,
                pad_token_id=self._pad_id,
            )
        return [text.strip() for text in self.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)]

    def _text_ids(self, text: str) -> list[int]:
        """Ids without an end token, which some tokenizers append by themselves; OPT's leading token has the same id."""
        ids, end = self.tokenizer.encode(text), self.tokenizer.eos_token_id
        is_leading = len(ids) == 1 and self.tokenizer.bos_token_id == end
        return ids[:-1] if ids[-1:] == [end] and not is_leading else ids

    @property
    def _pad_id(self) -> int:
        """Padding is masked, so any id serves a tokenizer that has none."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


class DecoderLanguageModel(LanguageModel):
    """Any `AutoModelForCausalLM` (OPT, GPT-2, Llama, Qwen, ...): soft prompts, then prompt, then answer."""

    is_encoder_decoder = False

    def tokenize(self, prompts: Sequence[str], answers: Sequence[str], *, max_tokens: int) -> LanguageBatch:
        """See `LanguageModel.tokenize`.

        The prompt's own leading token, where the tokenizer adds one, belongs to the prompt; without a prompt it is
        counted in the loss, as in LAVIS.
        """
        rows, labels, num_truncated = [], [], 0
        for prompt, answer in zip(prompts, answers, strict=True):
            prompt_ids, answer_ids = self._split(prompt, answer)
            num_truncated += len(prompt_ids) > max_tokens or len(answer_ids) + 1 > max_tokens
            prompt_ids, answer_ids = prompt_ids[:max_tokens], answer_ids[: max_tokens - 1]
            answer_ids.append(self.end_id)
            rows.append(prompt_ids + answer_ids)
            labels.append([IGNORED] * len(prompt_ids) + answer_ids)
        input_ids_BS, is_input_BS = _pad_right(rows, self._pad_id)
        return LanguageBatch(input_ids_BS, is_input_BS, _pad_right(labels, IGNORED)[0], num_truncated)

    def logits(self, prefix_BNL: Tensor, batch: LanguageBatch, is_prefix_BN: Tensor | None = None) -> Tensor:
        """See `LanguageModel.logits`; a sample without soft prompts and prompt has none for its first label."""
        logits_BRV = self.model(**self._with_prefix(prefix_BNL, batch, is_prefix_BN), use_cache=False).logits
        if is_prefix_BN is None:
            return logits_BRV[:, prefix_BNL.shape[1] - 1 : -1]
        step_T = torch.arange(batch.labels_BT.shape[1], device=logits_BRV.device)
        place_BT = (is_prefix_BN.sum(dim=1, keepdim=True) - 1 + step_T).clamp(min=0)
        return logits_BRV.gather(1, place_BT[..., None].expand(-1, -1, logits_BRV.shape[-1]))

    def _generation_inputs(self, prefixes: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        """Padding goes in front, so that the next token comes right after real ones; positions follow from the mask."""
        device, rows = prefixes[0].device, []
        for prefix_NL, prompt in zip(prefixes, prompts, strict=True):
            ids = self._text_ids(prompt)[: self.max_prompt_tokens]
            embedded_SL = self._embed(torch.tensor(ids, dtype=torch.long, device=device))
            rows.append(torch.cat([prefix_NL.to(embedded_SL.dtype), embedded_SL]))
        masks = [torch.ones(len(row), dtype=torch.long, device=device) for row in rows]
        return {
            "inputs_embeds": pad_sequence(rows, batch_first=True, padding_side="left"),
            "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
        }

    def _split(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of the joint text, cut where the prompt's own ids end.

        A token that a tokenizer merges across the border counts as the answer's.
        """
        if not prompt:
            return [], self._text_ids(answer)
        joint, alone = self._text_ids(f"{prompt} {answer}".strip()), self._text_ids(prompt)
        border = next((i for i, (a, b) in enumerate(zip(joint, alone, strict=False)) if a != b), len(alone))
        return joint[:border], joint[border:]


class EncoderDecoderLanguageModel(LanguageModel):
    """Any `AutoModelForSeq2SeqLM` of the T5 family: soft prompts and prompt to the encoder, answer to the decoder."""

    is_encoder_decoder = True

    def tokenize(self, prompts: Sequence[str], answers: Sequence[str], *, max_tokens: int) -> LanguageBatch:
        """See `LanguageModel.tokenize`; prompts end in the tokenizer's end token, as the encoder was trained."""
        prompt_rows, prompts_cut = self._ended(prompts, max_tokens, self.tokenizer.eos_token_id)
        answer_rows, answers_cut = self._ended(answers, max_tokens, self.end_id)
        input_ids_BS, is_input_BS = _pad_right(prompt_rows, self._pad_id)
        labels_BT, _ = _pad_right(answer_rows, IGNORED)
        num_truncated = sum(a or b for a, b in zip(prompts_cut, answers_cut, strict=True))
        return LanguageBatch(input_ids_BS, is_input_BS, labels_BT, num_truncated)

    def logits(self, prefix_BNL: Tensor, batch: LanguageBatch, is_prefix_BN: Tensor | None = None) -> Tensor:
        """See `LanguageModel.logits`."""
        return self.model(
            **self._with_prefix(prefix_BNL, batch, is_prefix_BN),
            labels=batch.labels_BT,  # from which the model makes the decoder's inputs
            decoder_attention_mask=(batch.labels_BT != IGNORED).long(),
            use_cache=False,
        ).logits

    def _generation_inputs(self, prefixes: Sequence[Tensor], prompts: Sequence[str]) -> dict[str, Tensor]:
        rows, _ = self._ended(prompts, self.max_prompt_tokens, self.tokenizer.eos_token_id)
        input_ids_BS, is_input_BS = (t.to(prefixes[0].device) for t in _pad_right(rows, self._pad_id))
        masks = [torch.ones(len(prefix_NL), dtype=torch.bool, device=prefix_NL.device) for prefix_NL in prefixes]
        prefix_BNL, is_prefix_BN = (pad_sequence(list(parts), batch_first=True) for parts in (prefixes, masks))
        return self._with_prefix(prefix_BNL, LanguageBatch(input_ids_BS, is_input_BS, input_ids_BS), is_prefix_BN)

    def _ended(self, texts: Sequence[str], max_tokens: int | None, end: int) -> tuple[list[list[int]], list[bool]]:
        """Ids of each text with its end, and which were cut."""
        rows = [self._text_ids(text) for text in texts]
        truncated = [row if max_tokens is None else row[: max_tokens - 1] for row in rows]
        cut = [len(a) < len(b) for a, b in zip(truncated, rows, strict=True)]
        return [[*row, end] for row in truncated], cut


def build_language_model(model: nn.Module, tokenizer: Any, max_prompt_tokens: int | None = None) -> LanguageModel:
    """Wrap a Hugging Face model by its kind."""
    kind = EncoderDecoderLanguageModel if cast(Any, model).config.is_encoder_decoder else DecoderLanguageModel
    return kind(model, tokenizer, max_prompt_tokens)


def _own_end_ids(model: Any) -> list[int]:
    """End ids of the model itself: those of its generation_config, else of its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        if (ids := getattr(config, "eos_token_id", None)) is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def _pad_right(rows: Sequence[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows as one int64 tensor, and a mask that is True at their own entries."""
    lengths_B = torch.tensor([len(row) for row in rows])
    ids_BT = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)
    return ids_BT, torch.arange(ids_BT.shape[1])[None] < lengths_B[:, None]
