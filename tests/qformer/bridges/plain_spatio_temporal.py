"""The spatio-temporal bridge written down plainly, clip by clip, with the weights of a `Stage2`.

Pooling writes the softmax of each head out; a head's values are its part of the tokens. Each kind of queries has its
own cross-attention over its own tokens, and its own feed-forward.
"""

import torch

from tests.qformer.plain import attend, ffn


def pool(query, tokens):
    """Means of tokens [N, V] with one weight a token and head."""
    heads, width = query.shape
    values = tokens.unflatten(-1, (heads, -1))
    pooled = []
    for head in range(heads):
        weight = ((tokens @ query[head]) / width**0.5).softmax(dim=0)
        pooled.append((weight[:, None] * values[:, head]).sum(dim=0))
    return torch.cat(pooled)


def pooled(frames, tokens):
    """A map [N, V] and a sequence [F, V] of one clip's real frames [F, N, V]."""
    last, number = len(frames.positions.table_MD) - 1, len(tokens)
    places = torch.arange(number) * (last / (number - 1) if number - 1 > last else 1)
    below = places.floor().long()
    share = (places - below)[:, None]
    table = frames.positions.table_MD
    tokens = tokens + ((1 - share) * table[below] + share * table[(below + 1).clamp(max=last)])[:, None]
    spatial = torch.stack([pool(frames.over_frames.query_HV, tokens[:, patch]) for patch in range(tokens.shape[1])])
    return spatial, torch.stack([pool(frames.over_space.query_HV, frame) for frame in tokens])


def plain_prompts(stage2, image, is_frame):
    """Soft prompts [B, Q, L]."""
    prompts = []
    for clip, real in zip(image, is_frame, strict=True):
        spatial, temporal = pooled(stage2.frames, stage2.vision_norm(clip[real]))
        tokens = (spatial, temporal, torch.cat([spatial, temporal]))
        hidden = stage2.qformer.embedding_norm(stage2.qformer.query_tokens)
        for layer in stage2.qformer.layers:
            hidden = attend(layer.attention, hidden, hidden, None)
            groups = hidden.split(stage2.bridge.group_sizes, dim=1)
            if layer.cross_attention is not None:
                groups = [
                    attend(layer.cross_attention, one, own[None], None) for one, own in zip(groups, tokens, strict=True)
                ]
            experts = layer.query_ffn.experts
            hidden = torch.cat([ffn(expert, one) for expert, one in zip(experts, groups, strict=True)], dim=1)
        prompts.append(stage2.language_projection(hidden[0]))
    return torch.stack(prompts)
