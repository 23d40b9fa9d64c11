"""Stage 1 written down plainly, with the weights of a `Stage1`: what the fast paths must equal.

Every pass is padded, every pair projects its image anew, every feature of every rank is gathered, attention is a
softmax over scores, and the language-model head runs everywhere. No dropout.
"""

import torch
from torch.nn import functional as F

from qformer.distributed import gather, mean_over_ranks

SMOOTHING = 0.1


def attend(block, hidden, source, mask):
    def heads(rows):
        return rows.unflatten(-1, (block.num_heads, -1)).transpose(1, 2)

    query, key, value = heads(block.query(hidden)), heads(block.key(source)), heads(block.value(source))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
    return block.norm(block.output(mixed) + hidden)


def ffn(block, hidden):
    return block.norm(block.down(F.gelu(block.up(hidden))) + hidden)


def text_embedding(qformer, ids):
    return qformer.word_embeddings(ids) + qformer.position_embeddings(torch.arange(ids.shape[1]))


def run(qformer, hidden, num_queries, image, mask, past=None):
    """Hidden states, and the input of every layer."""
    inputs, hidden = [], qformer.embedding_norm(hidden)
    for i, layer in enumerate(qformer.layers):
        inputs.append(hidden)
        source = hidden if past is None else torch.cat([past[i], hidden], dim=1)
        hidden = attend(layer.attention, hidden, source, mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if layer.cross_attention is not None and image is not None:
            queries = attend(layer.cross_attention, queries, image, None)
        hidden = torch.cat([ffn(layer.query_ffn, queries), ffn(layer.text_ffn, text)], dim=1)
    return hidden, inputs


def query_pass(stage1, image):
    """[B*F, P, V] to hidden states and the input of every layer."""
    queries = stage1.qformer.query_tokens.expand(len(image), -1, -1)
    return run(stage1.qformer, queries, queries.shape[1], image, None)


def text_pass(stage1, ids, mask):
    return run(stage1.qformer, text_embedding(stage1.qformer, ids), 0, None, mask[:, None, None])[0]


def joint_pass(stage1, image, ids, mask):
    queries = stage1.qformer.query_tokens.expand(len(ids), -1, -1)
    rows = torch.cat([queries, text_embedding(stage1.qformer, ids)], dim=1)
    seen = F.pad(mask, (queries.shape[1], 0), value=True)[:, None, None]
    return run(stage1.qformer, rows, queries.shape[1], image, seen)[0][:, : queries.shape[1]]


def decode_pass(stage1, ids, mask, cache):
    """Logits at every position. `cache` holds what the queries of all frames brought into each layer."""
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None] & mask[:, None]
    seen = F.pad(causal, (cache[0].shape[1], 0), value=True)[:, None]
    hidden, _ = run(stage1.qformer, text_embedding(stage1.qformer, ids), 0, None, seen, past=cache)
    hidden = stage1.qformer.lm_norm(F.gelu(stage1.qformer.lm_dense(hidden)))
    return hidden @ stage1.qformer.word_embeddings.weight.T + stage1.qformer.lm_bias


def plain_losses(stage1, batch, negatives):
    """itc, itm, itg of this rank's share."""
    size, frames = batch.image_BFPV.shape[:2]
    ids, mask, valid = batch.input_ids_BT, batch.is_text_BT, batch.is_valid_B
    tokens = stage1.vision_norm(batch.image_BFPV)
    hidden, inputs = query_pass(stage1, tokens.flatten(0, 1))
    queries = F.normalize(stage1.vision_projection(hidden), dim=-1).unflatten(0, (size, frames)).flatten(1, 2)
    text = F.normalize(stage1.text_projection(text_pass(stage1, ids, mask)[:, 0]), dim=-1)

    all_valid = gather(valid, with_gradient=False)
    same = batch.image_ids_B[:, None] == gather(batch.image_ids_B, with_gradient=False)[None]
    target = (same & all_valid).float()
    target = target / target.sum(dim=1, keepdim=True).clamp(min=1)
    target = (1 - SMOOTHING) * target + SMOOTHING * all_valid.float() / all_valid.sum()
    all_text, all_queries = gather(text, with_gradient=True), gather(queries, with_gradient=True)
    directions = []
    for scores in (
        (queries[:, :, None] * all_text).sum(-1).amax(1),
        (all_queries[None] * text[:, None, None]).sum(-1).amax(2),
    ):
        logp = (scores / stage1.temperature).masked_fill(~all_valid, -1e30).log_softmax(dim=1)
        loss = -(target * logp.masked_fill(~all_valid, 0.0)).sum(dim=1)
        directions.append(mean_over_ranks(loss[valid].sum(), valid.sum()))
    itc = sum(directions) / 2

    all_tokens = gather(tokens, with_gradient=True)
    all_ids, all_mask = gather(ids, with_gradient=False), gather(mask, with_gradient=False)
    pair_image = torch.cat([tokens, all_tokens[negatives.image_B], tokens])
    pair_ids = torch.cat([ids, ids, all_ids[negatives.text_B]])
    pair_mask = torch.cat([mask, mask, all_mask[negatives.text_B]])
    counts = torch.cat([valid, valid & negatives.has_negative_B, valid & negatives.has_negative_B])
    logits = torch.stack(
        [stage1.itm_head(joint_pass(stage1, pair_image[:, f], pair_ids, pair_mask)).mean(1) for f in range(frames)]
    ).mean(0)
    labels = (torch.arange(3 * size) < size).long()
    itm = mean_over_ranks(F.cross_entropy(logits[counts], labels[counts], reduction="sum"), counts.sum())

    decoder_ids = ids.clone()
    decoder_ids[:, 0] = stage1.dec_id
    cache = [rows.unflatten(0, (size, frames)).flatten(1, 2) for rows in inputs]
    logits = decode_pass(stage1, decoder_ids, mask, cache)[:, :-1]
    labels = ids.masked_fill(~(mask & valid[:, None]), -100)[:, 1:]
    lm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=SMOOTHING, reduction="sum")
    itg = mean_over_ranks(lm, (labels != -100).sum())
    return itc, itm, itg
