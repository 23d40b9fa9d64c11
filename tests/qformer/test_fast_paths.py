"""Every fast path of stage 1 against the plain one: forward and gradient, in one process and in two."""

import dataclasses
from unittest import mock

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from qformer.attention import Part, Rows
from qformer.bridges.protocol import BridgeText
from qformer.distributed import fetch_rows, gather, rank, world_size
from qformer.objectives import Negatives
from qformer.objectives.stage1 import TERMS, Stage1
from qformer.objectives.stage2 import Stage2
from tests.distributed import run_processes
from tests.qformer import plain
from tests.qformer.objectives.test_stage1 import CLOSE, CONFIG, batch, cyclic_negatives, gradients, model, take


def assert_same_gradients(first, second):
    for name, gradient in gradients(first).items():
        torch.testing.assert_close(gradients(second)[name], gradient, **CLOSE, msg=lambda text, name=name: name + text)


def assert_fast_equals_plain(full, negatives, *, is_checkpointed=False):
    fast, slow = model(), model()
    fast.qformer.layers.is_checkpointed = is_checkpointed
    losses = fast(full, negatives=negatives)
    losses.total.backward()
    expected = plain.plain_losses(slow, full, negatives)
    sum(expected).backward()
    for ours, theirs in zip((losses.terms[name] for name in TERMS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert_same_gradients(slow, fast)
    assert all(gradient is not None for gradient in gradients(fast).values())


@pytest.mark.parametrize("frames", [1, 3])
def test_fast_equals_plain(frames):
    assert_fast_equals_plain(batch(6, frames), cyclic_negatives(6))


def masked_and_shared(frames=1):
    """Samples 0 and 1 and, across two ranks, 2 and 4 share an image; 3 is masked, and 2 has no negative."""
    full = take(
        batch(6, frames),
        slice(None),
        image_ids_B=torch.tensor([0, 0, 2, 3, 2, 5]),
        is_valid_B=torch.tensor([True, True, True, False, True, True]),
    )
    has = torch.tensor([True, True, False, True, True, True])
    return full, Negatives(torch.tensor([2, 4, 0, 0, 5, 1]), torch.tensor([5, 5, 0, 1, 1, 2]), has)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_fast_equals_plain_with_masked_samples_and_shared_images(is_checkpointed):
    assert_fast_equals_plain(*masked_and_shared(), is_checkpointed=is_checkpointed)


def two_ranks_equal_plain(rank, world):
    rows = slice(rank * 3, rank * 3 + 3)

    def own(full, negatives):
        return take(full, rows), Negatives(*(values[rows] for values in negatives))

    # Rank 0 wants rows 3 (twice) and 1; rank 1 wants only its own, so nothing travels to it.
    image, text = torch.tensor([3, 3, 1, 4, 5, 3]), torch.tensor([1, 5, 4, 0, 1, 2])
    chosen = Negatives(image, text, torch.ones(6, dtype=torch.bool))
    assert_fast_equals_plain(*own(batch(6, frames=2), chosen))
    for is_checkpointed in (False, True):
        assert_fast_equals_plain(*own(*masked_and_shared(frames=2)), is_checkpointed=is_checkpointed)
    assert_compiled_equals_eager()


def test_fast_equals_plain_in_two_processes():
    run_processes(two_ranks_equal_plain, 2)


def assert_compiled_equals_eager():
    """With dropout, whose draws are the same from the same seed; under DDP where there are several ranks.

    `aot_eager` traces forward and backward, as the real compiler does, and then runs them operation by operation. An
    instruction-aware stage 2 has everything that a layer can do in the one pass to trace.
    """
    torch._dynamo.reset()
    config, results = dataclasses.replace(CONFIG, num_layers=2, dropout=0.3, has_lm_head=False), []
    full = batch(3, seed=rank())
    for is_compiled in (False, True):
        torch.manual_seed(3)
        stage2 = Stage2(config, language_width=16).train()
        if is_compiled:
            stage2.qformer.layers.compile(backend="aot_eager", fullgraph=True)
        call = DistributedDataParallel(stage2) if world_size() > 1 else stage2
        torch.manual_seed(4 + rank())
        prefix = call(full.image_BFPV, BridgeText(full.input_ids_BT, full.is_text_BT)).prompts_BNL
        prefix.square().mean().backward()
        results.append((stage2, prefix))
    (eager, expected), (compiled, found) = results
    torch.testing.assert_close(found, expected, **CLOSE)
    for name, gradient in gradients(eager).items():
        if gradient is not None:  # the last layer's text feed-forward is not trained
            torch.testing.assert_close(gradients(compiled)[name], gradient, **CLOSE, msg=name)


def test_compiled_equals_eager_with_dropout():
    assert_compiled_equals_eager()


def fetches_the_chosen_rows(rank, world):
    local = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    twin = local.detach().clone().requires_grad_()
    wanted = torch.tensor([[7, 0, 7, 2], [8, 8, 6, 3], [1, 5, 0, 7]])[rank]
    fetched, place = fetch_rows(local, wanted)
    # Each row of another rank once: 7 | 8, 6 | 1, 5, 0 of ranks of three rows.
    assert len(fetched) == [1, 2, 3][rank]
    rows, expected = torch.cat([local, fetched])[place], gather(twin, with_gradient=True)[wanted]
    torch.testing.assert_close(rows, expected, atol=0, rtol=0)
    weight = torch.randn(rows.shape, generator=torch.Generator().manual_seed(10 + rank))
    (rows * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(local.grad, twin.grad, **CLOSE)


def test_only_the_chosen_rows_travel_and_their_gradients_come_back():
    run_processes(fetches_the_chosen_rows, 3)


@pytest.mark.parametrize("is_cls_only", [False, True])
def test_the_text_pass_equals_plain(is_cls_only):
    stage1, full = model(), batch(4)
    text = stage1.qformer.forward_text(full.input_ids_BT, full.is_text_BT, is_cls_only=is_cls_only)
    expected = plain.text_pass(stage1, full.input_ids_BT, full.is_text_BT)
    expected = expected[:, 0] if is_cls_only else expected[full.is_text_BT]
    torch.testing.assert_close(text, expected, **CLOSE)


def test_several_texts_of_an_image_share_its_keys_and_values():
    stage1, texts = model(), batch(8)
    image = torch.randn(5, 7, 24)
    key_values = stage1.qformer.image_key_values(image)
    some = [None if kv is None else kv.take(torch.tensor([0, 1, 2])) for kv in key_values]
    others = [None if kv is None else kv.take(torch.tensor([3, 4])) for kv in key_values]
    hidden = stage1.qformer.forward_joint(some, texts.input_ids_BT, texts.is_text_BT, others)
    repeated = image[[0, 0, 1, 1, 2, 2, 3, 4]]
    torch.testing.assert_close(
        hidden, plain.joint_pass(stage1, repeated, texts.input_ids_BT, texts.is_text_BT), **CLOSE
    )
    with pytest.raises(ValueError, match="8 texts for 5 images"):
        stage1.qformer.forward_joint(key_values, texts.input_ids_BT, texts.is_text_BT)


def test_masked_image_tokens_are_as_if_they_were_not_there():
    """Queries alone, and with texts of which two share an image."""
    stage1, texts, image = model(), batch(5), torch.randn(3, 7, 24)
    is_real = torch.arange(7)[None] < torch.tensor([7, 2, 4])[:, None]
    spoilt, qformer = stage1.qformer.image_key_values(image.masked_fill(~is_real[..., None], 9.0)), stage1.qformer
    queries = qformer.forward_queries(spoilt, is_real).hidden_BQD
    some, others = ([None if kv is None else kv.take(torch.tensor(rows)) for kv in spoilt] for rows in ([1, 2], [0]))
    joint = qformer.forward_joint(some, texts.input_ids_BT, texts.is_text_BT, others, is_image=is_real[[1, 2]])
    for row, cut in enumerate((7, 2, 4)):
        alone = qformer.image_key_values(image[row : row + 1, :cut])
        torch.testing.assert_close(queries[row : row + 1], qformer.forward_queries(alone).hidden_BQD, **CLOSE)
        for text in ([4], [0, 1], [2, 3])[row]:
            ids, mask = texts.input_ids_BT[text : text + 1], texts.is_text_BT[text : text + 1]
            torch.testing.assert_close(joint[text : text + 1], qformer.forward_joint(alone, ids, mask), **CLOSE)


def test_only_what_draws_random_numbers_keeps_their_state_for_the_second_computation():
    stage1 = Stage1(dataclasses.replace(CONFIG, dropout=0.3)).train()
    layer, hidden = stage1.qformer.layers[0], torch.randn(10, 32)
    rows = Rows(2, 5, 5)
    with mock.patch.object(torch, "get_rng_state", wraps=torch.get_rng_state) as read:
        layer.query_ffn(hidden)
        assert not read.called
        layer.attention(hidden, [Part(rows, layer.attention.packed_key_value(hidden, rows))])
        assert read.called


def test_attention_maps_on_request_are_those_of_the_plain_softmax():
    stage1, image = model(), torch.randn(2, 7, 24)
    maps = stage1.qformer.cross_attention_maps(stage1.qformer.image_key_values(image))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 5, 7)] * 2  # layers 0 and 2 cross-attend
    layer = stage1.qformer.layers[0]
    queries = stage1.qformer.embedding_norm(stage1.qformer.query_tokens.expand(2, -1, -1))
    queries = plain.attend(layer.attention, queries, queries, None)
    block = layer.cross_attention
    query = block.query(queries).unflatten(-1, (4, 8)).transpose(1, 2)
    key = block.key(image).unflatten(-1, (4, 8)).permute(0, 2, 3, 1)
    torch.testing.assert_close(maps[0], (query @ key / 8**0.5).softmax(-1), **CLOSE)
    assert not any(block._forward_pre_hooks for block in stage1.modules())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(dropout):
    """Dropout included: the second computation draws the first one's masks."""
    results = []
    for is_checkpointed in (False, True):
        config = dataclasses.replace(CONFIG, dropout=dropout, activation_checkpointing=is_checkpointed)
        torch.manual_seed(3)
        stage1 = Stage1(config).train()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            losses = stage1(batch(4), negatives=cyclic_negatives(4))
        losses.total.backward()
        results.append((stage1, losses, sum(saved)))
    (plainly, first, kept), (checkpointed, second, kept_less) = results
    torch.testing.assert_close(second.total, first.total, **CLOSE)
    assert_same_gradients(plainly, checkpointed)
    assert kept_less < 0.6 * kept


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_hot_path_compiles_without_graph_breaks(is_checkpointed):
    """`fullgraph` raises at a graph break; steps with texts of other lengths must not either, nor compile for ever."""
    torch._dynamo.reset()
    deep = dataclasses.replace(CONFIG, num_layers=8)
    stage1, eager = model(deep), model(deep)
    stage1.qformer.layers.is_checkpointed = is_checkpointed
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    stage1.qformer.layers.compile(backend=backend, fullgraph=True)
    compiled_after = []
    for seed in range(5):
        full = batch(4, length=9 + seed, seed=seed)
        for each in (stage1, eager):
            each.zero_grad()
            losses = each(full, negatives=cyclic_negatives(4))
            losses.total.backward()
        assert_same_gradients(eager, stage1)
        compiled_after.append(len(graphs))
    # Not 32, four passes of eight layers: layers share a graph for queries, text, pairs and decoding, with and without
    # cross-attention, and for what the last layer alone does; and once more when sizes turn out to vary.
    assert compiled_after[0] == 8
    assert compiled_after[-1] == compiled_after[2] <= 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_BFPV": torch.zeros(4, 7, 24)}, r"\(4, 7, 24\) .*\[B, F, P, 24\]"),
        ({"image_BFPV": torch.zeros(4, 1, 7, 24, dtype=torch.uint8)}, "uint8"),
        ({"image_BFPV": torch.zeros(4, 1, 7, 24, dtype=torch.float16)}, r"torch\.float16 .* torch\.float32"),
        ({"is_valid_B": torch.ones(4, dtype=torch.int64)}, r"is_valid_B is torch\.int64 .* torch\.bool"),
        ({"image_BFPV": torch.zeros(4, 1, 7, 25)}, r"\(4, 1, 7, 25\) .*encoder_width=24"),
        ({"image_BFPV": torch.zeros(3, 1, 7, 24)}, "3 samples but input_ids_BT 4"),
        ({"is_valid_B": torch.ones(5, dtype=torch.bool)}, "4 samples but is_valid_B 5"),
        ({"is_text_BT": torch.ones(4, 8, dtype=torch.bool)}, r"\(4, 9\) and their mask is \(4, 8\)"),
        ({"input_ids_BT": torch.full((4, 9), 40)}, "from 40 to 40, outside .* vocab_size=40"),
        (
            {"input_ids_BT": torch.ones(4, 600).long(), "is_text_BT": torch.ones(4, 600).bool()},
            "600 tokens exceeds max_positions=512",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_by_name(changes, message):
    full = batch(4)
    assert full.input_ids_BT.shape == (4, 9)
    with pytest.raises(ValueError, match=message):
        model()(take(full, slice(None), **changes), negatives=cyclic_negatives(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(value):
    full = batch(4)
    full.image_BFPV[2, 0, 3, 1] = value
    with pytest.raises(ValueError, match=r"NaN or infinity .* 1 of 4 samples: cat\.jpg"):
        model()(take(full, slice(None), sample_ids=("a", "b", "cat.jpg", "d")), negatives=cyclic_negatives(4))
    with pytest.raises(ValueError, match="1 of 4 samples: row 2"):
        model()(full, negatives=cyclic_negatives(4))


def test_a_text_of_padding_alone_stays_finite():
    full = batch(3)
    full.is_text_BT[2] = False
    full.input_ids_BT[2] = 0
    stage1 = model()
    losses = stage1(take(full, slice(None), is_valid_B=torch.tensor([True, True, False])))
    losses.total.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(stage1).values())
