"""Losses of retrieval, each against its equation written out with loops."""

import math

import pytest
import torch
from crossmodal.modeling import contrastive_crossmodal as C


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def unit(*shape, seed=0):
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1)


# Row 0 and 2 share an image, 1 and 4 a text.
LABELS = torch.tensor([[0, 0], [1, 1], [0, 2], [3, 3], [4, 1], [5, 5], [6, 6]])


def written_out(queries, keys, scale, query_labels, key_labels):
    total, counted = 0.0, 0
    for i, query in enumerate(queries):
        exponentials = [math.exp(scale * float(query @ key)) for key in keys]
        own = [j for j in range(len(keys)) if any(query_labels[i] == key_labels[j])]
        if own:
            counted += 1
            total -= sum(math.log(exponentials[j] / sum(exponentials)) for j in own) / len(own)
    return total, counted


def test_info_nce_is_its_equation_with_several_positives_and_with_none():
    queries, keys = unit(7, 8), unit(5, 8, seed=1)
    total, counted = C.info_nce(queries, keys, torch.tensor(5.0), LABELS, LABELS[:5])
    expected, number = written_out(queries, keys, 5.0, LABELS, LABELS[:5])
    assert counted == number == 5
    assert abs(total.item() - expected) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_info_nce_in_tiles_equals_the_whole_gradient_by_gradient(chunk):
    results = []
    for size in (None, chunk):
        queries, keys = unit(7, 8).float().requires_grad_(), unit(6, 8, seed=1).float().requires_grad_()
        scale = torch.tensor(20.0, requires_grad=True)
        total, counted = C.info_nce(queries, keys, scale, LABELS, LABELS[:6], size)
        (3.0 * total).backward()
        results.append([total, counted, queries.grad, keys.grad, scale.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_info_nce_in_tiles_is_finite_where_exponentials_are_not():
    queries = (unit(4, 8).float() * 30).requires_grad_()
    total, _ = C.info_nce(queries, queries, torch.tensor(1.0), LABELS[:4], LABELS[:4], 2)
    total.backward()
    assert total.isfinite() and queries.grad.isfinite().all()


def test_sigmoid_contrast_is_its_equation():
    queries, keys = unit(4, 8), unit(5, 8, seed=1)
    total, count = C.sigmoid_contrast(queries, keys, torch.tensor(10.0), torch.tensor(-2.0), LABELS[:4], LABELS[:5])
    expected = 0.0
    for i in range(4):
        for j in range(5):
            sign = 1 if (LABELS[i] == LABELS[j]).any() else -1
            expected += math.log(1 + math.exp(-sign * (10.0 * float(queries[i] @ keys[j]) - 2.0)))
    assert count == 4 and abs(total.item() - expected) < 1e-6


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_contrast_keeps_its_precision_under_autocast(chunk_size):
    vectors = [unit(8, 16).float(), unit(8, 16, seed=1).float(), torch.tensor(100.0)]
    vectors = [vector.requires_grad_() for vector in vectors]
    labels = torch.arange(8)[:, None]
    found = {}
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            total, _ = C.info_nce(*vectors, labels, labels, chunk_size)
        found[half] = total, *torch.autograd.grad(total, vectors)
    for there, expected in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-4)


def test_hardest_triplets_never_take_a_positive_for_a_negative():
    scores = torch.tensor([[0.5, 0.9, 0.45], [0.1, 0.2, 0.0], [0.3, 0.3, 0.8]])
    positive = torch.eye(3, dtype=torch.bool)
    own = torch.arange(3)
    total, count = C.hardest_triplets(scores, positive, own, 0.2)
    assert count == 3 and abs(total.item() - (0.6 + 0.1 + 0.0)) < 1e-6
    positive[0, 1] = True
    total, _ = C.hardest_triplets(scores, positive, own, 0.2)
    assert abs(total.item() - (0.15 + 0.1)) < 1e-6
    # Of rows and columns in other places: the same two rows, and one whose partner is not there.
    total, count = C.hardest_triplets(scores[[2, 0, 1]], positive[[2, 0, 1]], torch.tensor([2, 0, -1]), 0.2)
    assert count == 2 and abs(total.item() - 0.15) < 1e-6


def test_negatives_are_drawn_by_how_alike_they_are_and_never_among_positives():
    scores = torch.tensor([[9.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    positive = torch.tensor([[True, False, False, False]]).repeat(4000, 1)
    drawn, found = C.draw_negatives(scores, positive, generator=torch.Generator().manual_seed(0))
    parts = torch.bincount(drawn[:, 0], minlength=4) / 4000
    expected = torch.softmax(torch.tensor([2.0, 1.0, 0.0]), 0)
    assert found.all() and parts[0] == 0
    torch.testing.assert_close(parts[1:], expected, rtol=0, atol=0.03)
    _, found = C.draw_negatives(scores[:1], torch.ones(1, 4, dtype=torch.bool))
    assert not found.any()


def test_several_negatives_are_drawn_once_each_and_never_among_positives():
    scores = torch.tensor([[9.0, 2.0, 1.0, 0.0]]).repeat(3000, 1)
    positive = torch.tensor([[True, False, False, False]]).repeat(3000, 1)
    drawn, found = C.draw_negatives(scores, positive, 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (3000, 2) and found.all() and (drawn > 0).all() and (drawn[:, 0] != drawn[:, 1]).all()
    firsts = torch.bincount(drawn[:, 0], minlength=4)[1:] / 3000
    weights = scores[0].softmax(0)[1:] + 1e-5
    torch.testing.assert_close(firsts, weights / weights.sum(), rtol=0, atol=0.03)
    # Where the positive leads by far, by chance.
    scores[:, 0] = 40
    drawn, _ = C.draw_negatives(scores, positive, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        torch.bincount(drawn[:, 0], minlength=4)[1:] / 3000, torch.full((3,), 1 / 3), rtol=0, atol=0.03
    )
    drawn, found = C.draw_negatives(scores[:1], positive[:1], 9)
    assert drawn.shape == (1, 4) and found.sum() == 3


def test_the_ranking_loss_is_its_equation():
    own, others = torch.tensor([1.0, 0.5, 2.0]), torch.tensor([[0.2, 3.0], [0.1, 9.0], [5.0, 5.0]])
    there = torch.tensor([[True, True], [True, False], [False, False]])
    one = math.log(math.e + math.exp(0.2) + math.exp(3.0)) - 1.0
    two = math.log(math.exp(0.5) + math.exp(0.1)) - 0.5
    found = C.ranking_loss(own, others.requires_grad_(), there)
    assert abs(found.item() - (one + two) / 2) < 1e-5
    found.backward()
    assert others.grad[2].abs().sum() == 0 and others.grad[1, 1] == 0 and others.grad.isfinite().all()


def test_recovered_tokens_are_their_equation():
    query, tokens, key, value = (
        unit(*shape, seed=k) for k, shape in enumerate([(2, 3, 8), (2, 3, 8), (4, 5, 8), (4, 5, 8)])
    )
    token_mask = torch.tensor([[True, True, False], [True, True, True]])
    key_mask = torch.ones(4, 5, dtype=torch.bool)
    key_mask[1, 3:] = False
    found = C.recovered_tokens(query, key, value, tokens, token_mask, key_mask)
    for i in range(2):
        for j in range(4):
            cosines = []
            for w in range(3):
                if token_mask[i, w]:
                    scores = (key[j, key_mask[j]] @ query[i, w]) / math.sqrt(8)
                    seen = scores.softmax(0) @ value[j, key_mask[j]]
                    cosines.append(float(seen @ tokens[i, w] / seen.norm() / tokens[i, w].norm()))
            assert abs(found[i, j].item() - sum(cosines) / len(cosines)) < 1e-9


def test_late_interaction_is_its_equation():
    queries, keys = unit(2, 3, 8), unit(4, 5, 8, seed=1)
    query_mask = torch.tensor([[True, True, False], [True, True, True]])
    key_mask = torch.ones(4, 5, dtype=torch.bool)
    key_mask[2, 1:] = False
    found = C.late_interaction(queries, keys, query_mask, key_mask)
    for i in range(2):
        for j in range(4):
            best = [float((keys[j, key_mask[j]] @ queries[i, w]).max()) for w in range(3) if query_mask[i, w]]
            assert abs(found[i, j].item() - sum(best) / len(best)) < 1e-9


def test_the_notes_loss_is_the_squared_attention_and_is_lowered_by_shrinking():
    tokens, others = 3 * unit(2, 3, 8), 3 * unit(2, 5, 8, seed=1)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss, shown = C.cross_attention_penalty(tokens, others, mask)
    expected = 0.0
    for b in range(2):
        for w in range(3):
            if mask[b, w]:
                weights = (others[b] @ tokens[b, w] / math.sqrt(8)).softmax(0)
                expected += float((weights @ others[b]).square().sum())
    assert abs(loss.item() - expected / 2) < 1e-9
    smaller, shown_smaller = C.cross_attention_penalty(0.1 * tokens, 0.1 * others, mask)
    assert smaller < 0.02 * loss and shown_smaller["entropy"] > 0.99 > shown["entropy"]


def test_losses_are_combined_by_weight_and_by_uncertainty():
    losses = {"one": torch.tensor(2.0), "two": torch.tensor(3.0), "off": torch.tensor(torch.inf)}
    weights = {"one": 1.0, "two": 0.5, "off": 0.0}
    assert C.combine_losses(losses, weights) == 3.5
    learned = {"one": torch.tensor(0.3), "two": torch.tensor(-0.2), "off": torch.tensor(0.0)}
    expected = math.exp(-0.3) * 2 + 0.3 + 0.5 * (math.exp(0.2) * 3 - 0.2)
    assert abs(C.combine_losses(losses, weights, learned).item() - expected) < 1e-6
