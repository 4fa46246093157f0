"""Mixture of experts inside the model: references, precision, invariance."""
import pytest
import torch
from torch.nn import functional

from sparsecod import moe
from sparsecod.core import ModelConfig, Transformer, block_loss
from sparsecod.moe import (GATES, MixtureOfExperts, balance_loss, _expert_ends, experts_compiled,
                           experts_grouped, experts_loop, route,
                           router_z_loss)


def weights(E, D, F, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [.2 * torch.randn(*shape, generator=g) for shape in ((E, D, F), (E, D, F), (E, F, D))]


@pytest.mark.parametrize('E, k', [(1, 1), (4, 1), (4, 4), (8, 3)])
@pytest.mark.parametrize('gates', GATES)
def test_all_ways_equal_the_loop(E, k, gates):
    torch.manual_seed(0)
    results = []
    x, logits, ws = torch.randn(33, 16), torch.randn(33, E), weights(E, 16, 8)
    for run in (experts_loop, experts_grouped, experts_compiled):
        leaves = [t.clone().requires_grad_() for t in (x, logits, *ws)]
        out = run(leaves[0], route(leaves[1], k, gates), *leaves[2:])
        out.pow(2).sum().backward()
        results.append([out.detach()] + [t.grad for t in leaves])
    for wanted, *others in zip(*results):
        for found in others: torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_layer_equals_the_equation():
    "Every token by hand: top-k of the softmax, weighted SwiGLU outputs, shared expert averaged in."
    torch.manual_seed(0)
    layer = MixtureOfExperts(16, 8, E=4, k=2, shared=12)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=.3)
    x = torch.randn(2, 5, 16)
    got, routing = layer(x)
    for b in range(2):
        for t in range(5):
            p = (layer.router.weight @ x[b, t]).softmax(0)
            top = p.argsort(descending=True)[:2]
            swiglu = lambda e: (functional.silu(x[b, t] @ layer.gate[e]) * (
                x[b, t] @ layer.up[e])) @ layer.down[e]
            want = (layer.shared(x[b, t]) + 2 * sum(p[e] * swiglu(e) for e in top)) / 3
            assert torch.allclose(got[b, t], want, atol=1e-5)
            assert set(routing.experts[5 * b + t].tolist()) == set(top.tolist())


def test_widths_that_are_not_aligned_still_work():
    torch.manual_seed(0)
    layer = MixtureOfExperts(16, 21, E=4, k=3)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=.3)
    x = torch.randn(1, 7, 16)
    want = experts_loop(x[0], route(layer.router(x[0]), 3), layer.gate, layer.up, layer.down)
    assert torch.allclose(layer(x)[0][0], want, atol=1e-5)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=False)
    assert torch.allclose(compiled(x)[0][0], want, atol=1e-5)


@pytest.mark.parametrize('d_expert', [32, 21])
def test_autocast_runs_and_stays_close(d_expert):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=61, n_layers=2, d_model=16, n_heads=2, n_experts=4,
                                    d_expert=d_expert, init_std=.2))
    tokens = torch.randint(61, (2, 9))
    exact = model(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        rounded = model(tokens[:, :-1], tokens[:, 1:])
    rounded.backward()
    assert torch.isclose(exact, rounded, rtol=.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_trap_7_every_block_has_the_same_auxiliary_weight():
    "Blocks with equal routers add equal auxiliary losses, each w/L."
    torch.manual_seed(0)
    L = 3
    model = Transformer(ModelConfig(vocab_size=61, n_layers=L, d_model=16, n_heads=2, n_experts=4,
                                    init_std=.3))
    tokens = torch.randint(61, (4, 9))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    seen = []
    total = model(inputs, targets, watch=lambda l, out: seen.append(out))
    plain = model.token_losses(model.run(model.embed(inputs)), targets).mean()
    weighted = [.01 * balance_loss(out.routing, 4) + .001 * router_z_loss(out.routing) for out in seen]
    by_hand = sum(weighted) / L
    assert torch.isclose(total - plain, by_hand, atol=1e-6) and by_hand > 0
    assert torch.isclose(block_loss(model.config, seen[0], 4) * L, weighted[0])


def test_renormalised_gates_sum_to_one_and_published_ones_do_not():
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(route(logits, 2, 'renormalised').gates.sum(-1), torch.ones(100))
    assert (route(logits, 2).gates.sum(-1) < 1).all()


@pytest.mark.parametrize('experts, E', [([0, 0, 3], 4), ([2], 3), ([1, 1, 1, 0, 0], 2)])
def test_rows_of_each_expert_end_where_the_counts_say(experts, E):
    experts = torch.tensor(experts)
    assert _expert_ends(experts, E).tolist() == torch.bincount(experts, minlength=E).cumsum(0).tolist()


@pytest.mark.parametrize('fits', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_experts_equal_the_loop(monkeypatch, dtype, fits):
    "With grouped_mm, and as where it is missing; in one graph."
    monkeypatch.setattr(moe, '_fits_grouped', lambda x, gate: fits)
    torch.manual_seed(0)
    x, logits = torch.randn(330, 16, dtype=dtype, requires_grad=True), torch.randn(330, 4, requires_grad=True)
    ws = [w.requires_grad_() for w in weights(4, 16, 8)]
    slopes = []
    for run in (experts_loop,
                torch.compile(experts_compiled, backend='aot_eager', fullgraph=True, dynamic=False)):
        out = run(x, route(logits, 2), *ws)
        slopes.append([out, *torch.autograd.grad(out.float().pow(2).sum(), (x, logits, *ws))])
    close = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=.1, rtol=.05)
    for found, wanted in zip(*reversed(slopes)): torch.testing.assert_close(found, wanted, **close)


@pytest.mark.parametrize('dtype, D, fits', [(torch.float32, 16, False), (torch.bfloat16, 16, True),
                                            (torch.bfloat16, 12, False)])
def test_a_gpu_gets_grouped_products_in_bf16_only(dtype, D, fits):
    assert moe._fits_grouped(torch.empty(5, D, dtype=dtype, device='meta'),
                            torch.empty(4, D, 8, device='meta')) is fits


COUNTS = [(0, 1, 31, 32, 33, 200, 0, 7), (3, 0, 2), (0, 0, 130), (128, 64), (1,), (64, 0), (33, 33, 33)]


@pytest.mark.parametrize('counts', COUNTS)
def test_every_assignment_has_a_place_of_its_own_among_those_of_its_expert(counts):
    E, M = len(counts), sum(counts)
    experts = torch.arange(E).repeat_interleave(torch.tensor(counts))[torch.randperm(M)]
    places, assignments, ends = moe._expert_places(experts, E)
    assert torch.equal(assignments[places], torch.arange(M))     # so no two share a place
    assert (assignments == M).sum() == len(assignments) - M      # and the other places are empty
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    assert (starts[experts] <= places).all() and (places < ends[experts]).all()
    assert not (ends % moe._TILE).any() and ends[-1] <= len(assignments)


@pytest.mark.parametrize('counts', COUNTS)
def test_products_of_all_experts_are_those_of_each(counts):
    "Values, and derivatives by rows and matrices, also where an expert has no row or rows have no expert."
    torch.manual_seed(0)
    M = sum(counts)
    rows, ws = torch.randn(M + 5, 8, requires_grad=True), torch.randn(len(counts), 8, 6, requires_grad=True)
    found = moe._expert_products(rows, ws, torch.tensor(counts).cumsum(0).int())[:M]
    wanted = torch.cat([part @ w for part, w in zip(rows[:M].split(counts), ws)])
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(wanted)
    (by_rows, by_matrices), (rows_wanted, matrices_wanted) = (
        torch.autograd.grad(products, (rows, ws), slope) for products in (found, wanted))
    torch.testing.assert_close(by_rows[:M], rows_wanted[:M], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_matrices, matrices_wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_what_lies_past_the_last_expert_does_not_matter(dtype, monkeypatch):
    "Products leave those rows as they were in memory, where they may be anything."
    torch.manual_seed(0)
    grouped, plain = functional.grouped_mm, moe._expert_products
    def spoil(out, ends):
        return out if out.dim() == 3 else torch.where((torch.arange(len(out)) < ends[-1])[:, None], out, torch.nan)
    x, logits, ws = torch.randn(33, 16, dtype=dtype), torch.randn(33, 4), weights(4, 16, 8)
    results = []
    for bad in (False, True):
        if bad:
            monkeypatch.setattr(functional, 'grouped_mm',
                                lambda a, ws, offs: spoil(grouped(a, ws, offs=offs), offs))
            monkeypatch.setattr(moe, '_expert_products', lambda a, ws, ends: spoil(plain(a, ws, ends), ends))
        leaves = [t.clone().requires_grad_() for t in (x, logits, *ws)]
        out = experts_compiled(leaves[0], route(leaves[1], 2), *leaves[2:])
        results.append([out, *torch.autograd.grad(out.float().pow(2).sum(), leaves)])
    for found, wanted in zip(*results): assert torch.equal(found, wanted)


def test_no_tokens_are_no_error():
    layer = MixtureOfExperts(16, 8, E=4, k=2)
    assert layer(torch.zeros(0, 5, 16))[0].shape == (0, 5, 16)
