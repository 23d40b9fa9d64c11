"""Outputs, losses, gradients and checkpoint names of the four ways to read a clip, for comparison between commits.

`recorded.safetensors` was written by commit 698aac8, before there was one seam for all bridges:

    cd CHECKOUT_OF_698aac8 && env FIXED_CPU... PYTHONPATH=. python PATH_OF/record.py recorded.safetensors

`FIXED_CPU` takes the choice of kernels away from the machine. What still differs from one x86 machine to another (its
mathematical library) shows in `fingerprint`, of plain torch operations alone: where that is equal, the rest must be.
"""

import contextlib
import functools
import hashlib
import sys

import torch
from torch.nn import functional as F

FIXED_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
KINDS = ("concatenate", "mean", "cascaded", "spatio_temporal")
WIDTH, LANGUAGE_WIDTH, WORDS = 6, 10, 12
SIZES = {
    "encoder_width": WIDTH,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 6,
    "num_queries": 3,
    "max_positions": 8,
    "embed_dim": 4,
    "dropout": 0.1,
}
BRIDGES = {
    "concatenate": {},
    "mean": {},
    "cascaded": {"max_frames": 4, "num_queries": 2, "num_layers": 1, "freeze_frames": False},
    "spatio_temporal": {
        "max_frames": 4,
        "num_spatial_queries": 2,
        "num_temporal_queries": 2,
        "num_summary_queries": 1,
    },
}
AUDIO = {"encoder_width": 5, "num_queries": 2, "num_layers": 1, "max_segments": 4}
JOINT_AUDIO = {"encoder_width": 8, "is_joint": True}
IS_FRAME = torch.tensor([[True, False, True], [True, True, True], [True, False, False], [True, True, False]])
WEIGHTS = {"itc": 1.0, "itm": 1.0, "itg": 0.5, "diversity": 0.3}


class Before:
    """The models as commit 698aac8 calls them."""

    def __init__(self):
        from qformer.stage1 import Stage1, Stage1Batch
        from qformer.stage2 import Stage2
        from qformer.video.audio_branch import Sound
        from qformer.video.config import AudioConfig, VideoConfig

        from qformer.config import QFormerConfig

        self.config, self.video, self.audio, self.sound = QFormerConfig, VideoConfig, AudioConfig, Sound
        self.stage1_class, self.stage2_class, self.batch = Stage1, Stage2, Stage1Batch

    def stage1(self, kind, **changes):
        config = self.config(**SIZES, vocab_size=WORDS)
        return self.stage1_class(config, video=self.video(temporal=kind, **{**BRIDGES[kind], **changes}))

    def stage2(self, kind, *, reads_text=False, audio=None, **changes):
        config = self.config(**SIZES, vocab_size=WORDS if reads_text else 0, has_lm_head=False)
        video = self.video(temporal=kind, **{**BRIDGES[kind], **changes})
        audio = audio and self.audio(**audio)
        return self.stage2_class(config, language_width=LANGUAGE_WIDTH, video=video, audio=audio)

    def losses(self, model, batch, noise_key):
        from qformer.analysis.queries import diversity_loss
        from qformer.distributed import mean_over_ranks

        losses = model(batch, noise_key=noise_key)
        diversity = mean_over_ranks(*diversity_loss(losses.hidden_GQD, batch.is_valid_B, losses.is_frame_BF))
        return {"itc": losses.itc, "itm": losses.itm, "itg": losses.itg, "diversity": diversity}, losses.hidden_GQD

    def cached(self, model, batch, noise_key, backward):
        from pipelines.training.gradient_cache import cached_losses

        return cached_losses(
            model,
            batch,
            micro_batch=2,
            noise_key=noise_key,
            backward=backward,
            autocast=contextlib.nullcontext,
        )

    def embeddings(self, model, batch):
        seen = model.perceive(batch.image_BFPV, batch.is_frame_BF)
        frames, image = seen.tokens_BFPV.shape[1], model.qformer.image_key_values(seen.tokens_BFPV.flatten(0, 1))
        hidden = model.qformer.forward_queries(image, seen.is_token).hidden_BQD
        queries = model.embed_queries(hidden, frames, seen.is_frame_BF)
        logits = model.match_logits(image, batch.input_ids_BT, batch.is_text_BT, frames, seen)
        return queries, model.embed_text(batch.input_ids_BT, batch.is_text_BT), logits

    def prompts(self, model, tokens, is_frame, text, sound):
        prompts = model(tokens, *(text or ()), is_frame_BF=is_frame, sound=sound)
        return prompts, model.is_prompt(is_frame, sound, prompts), model.query_outputs(prompts)


class Now:
    """The models as they are called today."""

    def __init__(self):
        from qformer.bridges.audio_branch import Sound
        from qformer.bridges.config import AudioConfig
        from qformer.bridges.table import bridge_config
        from qformer.config import QFormerConfig
        from qformer.objectives.stage1 import Stage1, Stage1Batch
        from qformer.objectives.stage2 import Stage2

        self.config, self.bridge, self.audio, self.sound = QFormerConfig, bridge_config, AudioConfig, Sound
        self.stage1_class, self.stage2_class, self.batch = Stage1, Stage2, Stage1Batch

    def stage1(self, kind, **changes):
        config = self.config(**SIZES, vocab_size=WORDS)
        return self.stage1_class(config, bridge=self.bridge({"kind": kind, **BRIDGES[kind], **changes}))

    def stage2(self, kind, *, reads_text=False, audio=None, **changes):
        config = self.config(**SIZES, vocab_size=WORDS if reads_text else 0, has_lm_head=False)
        bridge = self.bridge({"kind": kind, **BRIDGES[kind], **changes})
        audio = audio and self.audio(**audio)
        return self.stage2_class(config, language_width=LANGUAGE_WIDTH, bridge=bridge, audio=audio)

    def losses(self, model, batch, noise_key):
        losses = model(batch, noise_key=noise_key)
        return losses.terms, losses.passes.hidden_GQD

    def cached(self, model, batch, noise_key, backward):
        from qformer.objectives.gradient_cache import cached_losses

        losses = cached_losses(
            model, batch, micro_batch=2, noise_key=noise_key, backward=backward, autocast=contextlib.nullcontext
        )
        return losses.terms, losses.passes.hidden_GQD

    def embeddings(self, model, batch):
        from qformer.bridges.protocol import BridgeInput, BridgeText

        given = BridgeInput(batch.image_BFPV, batch.is_frame_BF)
        image = model.encode_image(given)
        text = BridgeText(batch.input_ids_BT, batch.is_text_BT)
        return image.queries_BNE, model.embed_text(*text), model.match_logits(image.keys, text, given)

    def prompts(self, model, tokens, is_frame, text, sound):
        from qformer.bridges.protocol import BridgeText

        prompts = model(tokens, text and BridgeText(*text), is_frame, sound)
        return prompts.prompts_BNL, prompts.is_prompt_BN, model.query_outputs(prompts)


def spread(module):
    """Larger weights than the initial ones, so that what a model attends to shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        if hasattr(module, "temperature"):
            module.temperature.fill_(0.3)
    return module


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_for(api, frames, is_frame=None):
    generator = torch.Generator().manual_seed(5)
    is_text = torch.arange(6)[None] < torch.tensor([3, 6, 4, 5])[:, None]
    ids = torch.randint(1, WORDS - 1, is_text.shape, generator=generator).masked_fill(~is_text, 0)
    return api.batch(
        image_BFPV=drawn(4, frames, 7, WIDTH),
        input_ids_BT=ids,
        is_text_BT=is_text,
        image_ids_B=torch.tensor([0, 1, 2, 0]),
        is_valid_B=torch.tensor([True, True, True, frames == 1]),
        is_frame_BF=is_frame,
    )


def gradients(model):
    """All of them in one vector, by the order of names."""
    named = sorted((name, one) for name, one in model.named_parameters() if one.requires_grad)
    none = [name for name, one in named if one.grad is None]
    return torch.cat([one.grad.flatten() for _, one in named if one.grad is not None]), names_digest(none)


def names_digest(names):
    return torch.tensor(list(hashlib.sha256("\n".join(names).encode()).digest()[:8]), dtype=torch.uint8)


def checkpoint(model):
    """Digests of the names and shapes, of the names that are trained, and of the bytes, as they are initialised."""
    state = model.state_dict()
    names = [f"{name} {tuple(state[name].shape)}" for name in sorted(state)]
    trained = sorted(name for name, one in model.named_parameters() if one.requires_grad)
    content = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).digest()[:8]
    return {
        "names": names_digest(names),
        "trained": names_digest(trained),
        "bytes": torch.tensor(list(content), dtype=torch.uint8),
    }


def weighted_backward(terms, link=None):
    parts = [WEIGHTS[name] * value for name, value in terms.items()] + ([] if link is None else [link])
    torch.stack(parts).sum().backward()


def record_stage1(api, kind):
    build = functools.partial(seeded, api.stage1)
    found = {f"checkpoint.{name}": value for name, value in checkpoint(build(kind)).items()}
    if kind == "cascaded":
        found |= {f"frozen.{name}": value for name, value in checkpoint(build(kind, freeze_frames=True)).items()}
    for case, batch in {"image": batch_for(api, 1), "clip": batch_for(api, 3, IS_FRAME)}.items():
        model = spread(build(kind)).train()
        torch.manual_seed(2)
        terms, hidden = api.losses(model, batch, noise_key=7)
        weighted_backward(terms)
        found |= result(case, terms, model) | {f"{case}.hidden": hidden.detach()}
        embedded = api.embeddings(model.eval(), batch)
        found |= {f"{case}.embedding{i}": value.detach() for i, value in enumerate(embedded)}
    model = spread(build(kind)).train()
    torch.manual_seed(2)
    terms, hidden = api.cached(model, batch_for(api, 3, IS_FRAME), 7, weighted_backward)
    return found | result("cached", terms, model) | {"cached.hidden": hidden.detach()}


def result(case, terms, model):
    vector, none = gradients(model)
    values = {f"{case}.{name}": value.detach() for name, value in terms.items()}
    return values | {f"{case}.gradients": vector, f"{case}.without_gradient": none}


def record_stage2(api, kind):
    found = {}
    sound = api.sound(drawn(4, 2, 5, seed=8), torch.tensor([[True, True], [False, False], [True, False], [True, True]]))
    joint = api.sound(drawn(4, 3, 8, seed=8), IS_FRAME.flip(1))
    batch = batch_for(api, 3, IS_FRAME)
    cases = {
        "image": ({}, {}),
        "clip": ({}, {"is_frame": IS_FRAME}),
        "text": ({"reads_text": True}, {"is_frame": IS_FRAME, "text": (batch.input_ids_BT, batch.is_text_BT)}),
        "sound": ({"audio": AUDIO}, {"is_frame": IS_FRAME, "sound": sound}),
    }
    if kind == "cascaded":
        cases["joint"] = ({"audio": JOINT_AUDIO}, {"is_frame": IS_FRAME, "sound": joint})
    for case, (build, given) in cases.items():
        model = seeded(api.stage2, kind, **build)
        found |= {f"{case}.checkpoint.{name}": value for name, value in checkpoint(model).items()}
        model = spread(model).train()
        torch.manual_seed(3)
        tokens = drawn(4, 1 if case == "image" else 3, 7, WIDTH)
        arguments = {"is_frame": None, "text": None, "sound": None, **given}
        prompts, is_prompt, outputs = api.prompts(model, tokens, **arguments)
        is_prompt = torch.ones(prompts.shape[:2], dtype=torch.bool) if is_prompt is None else is_prompt
        target = drawn(*prompts.shape, seed=4)
        loss = ((prompts - target).square() * is_prompt[..., None]).sum() + 0.1 * outputs.square().sum()
        loss.backward()
        found |= result(case, {"loss": loss}, model)
        found |= {
            f"{case}.prompts": prompts.detach(),
            f"{case}.is_prompt": is_prompt,
            f"{case}.outputs": outputs.detach(),
        }
    return found


def seeded(build, *arguments, **more):
    torch.manual_seed(0)
    return build(*arguments, **more)


def fingerprint():
    """How this machine rounds: operations such as the models use, without them."""
    torch.manual_seed(11)
    hidden = torch.randn(4, 9, 8, requires_grad=True)
    weight, bias = torch.randn(8, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    heads = F.linear(hidden, weight, bias).unflatten(-1, (2, 4)).transpose(1, 2)
    mask = torch.rand(4, 1, 9, 9) > 0.2
    attended = F.scaled_dot_product_attention(heads, heads, heads.square(), mask, 0.1).transpose(1, 2).flatten(2)
    normed = F.dropout(F.layer_norm(F.gelu(attended) + hidden, (8,), eps=1e-12), 0.1)
    loss = F.cross_entropy(F.normalize(normed, dim=-1).flatten(0, 1), torch.arange(36) % 8, label_smoothing=0.1)
    loss = loss + torch.einsum("bnd,md->bnm", normed, weight).amax(dim=1).log_softmax(dim=1).square().sum()
    loss.backward()
    tensors = (loss.detach(), attended.detach(), hidden.grad, weight.grad, bias.grad)
    content = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).digest()
    return torch.tensor(list(content[:8]), dtype=torch.uint8)


def record(api):
    found = {"fingerprint": fingerprint()}
    for kind in KINDS:
        for stage, one in (("1", record_stage1), ("2", record_stage2)):
            found |= {f"{kind}.{stage}.{name}": value for name, value in one(api, kind).items()}
    return found


def main():
    from safetensors.torch import save_file

    try:
        api = Now()
    except ImportError:
        api = Before()
    save_file({name: value.contiguous() for name, value in record(api).items()}, sys.argv[1])


if __name__ == "__main__":
    main()
