"""Every kernel beside the formula it stands for: values and gradients, for shapes that hypothesis draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.kernels import documents as within_documents
from lorica.kernels import few, folding, head
from lorica.kernels.documents import Documents, attention, documents
from lorica.kernels.elementwise import ACTIVATIONS, RMSNorm, Rotary
from lorica.kernels.experts import grouped
from lorica.kernels.head import LabelledLoss, Shape
from lorica.kernels.lowrank import GatedMLP, Group, Matrix, SameInput, Update
from lorica.kernels.within import SHORT, Within, layout

quick = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


class Draw:
    """Random tensors of one seed, in fp64 where nothing else is said, so that only the formula can differ."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, grad: bool = False) -> torch.Tensor:
        found = torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return found.requires_grad_(grad)


def differing(ours, theirs, inputs, rel=1e-9):
    """Where both do not give the same values, and the same gradients of a random sum of them."""
    ours, theirs = (each if isinstance(each, tuple) else (each,) for each in (ours, theirs))
    weights = [torch.randn(each.shape, generator=torch.Generator().manual_seed(7)).to(each) for each in theirs]
    found = []
    for each in (ours, theirs):
        total = sum((value * weight).sum() for value, weight in zip(each, weights, strict=True))
        found.append([*each, *torch.autograd.grad(total, inputs)])
    pairs = zip(*found, strict=True)
    return [(a, b) for a, b in pairs if not (a - b).abs().max() <= rel * max(0.1, b.abs().max())]


@quick
@given(
    seed=seeds,
    tokens=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    biased=st.booleans(),
    transposed=st.booleans(),
    gained=st.booleans(),
    sliced=st.booleans(),
)
def test_a_group_is_its_projections_and_the_updates_of_each_run_of_tokens(
    seed, tokens, biased, transposed, gained, sliced
):
    draw, width, outs = Draw(seed), 7, (8, 6)
    x = draw(1, sum(tokens), width, grad=True)
    matrices = [
        Matrix(draw(width, out) if transposed else draw(out, width), draw(out) if biased else None, transposed)
        for out in outs
    ]
    updates, factors, gains, start = [], [], [], 0
    for run, count in enumerate(tokens):
        for k, out in enumerate(outs):
            if (seed >> (2 * run + k)) % 4 == 0:
                continue  # an adapter that does not act on this matrix
            columns = (1, out - 2) if sliced and not gained else None
            r, size = 1 + (seed + run) % 3, out if columns is None else out - 3
            updates.append(Update(k, 0.5 + run, (start, start + count), columns, gained=gained))
            factors += [draw(r, width, grad=True), draw(size, r, grad=True)]
            gains += [draw(out, grad=True)] if gained else []
        start += count
    wanted = []
    for k, matrix in enumerate(matrices):
        W = matrix.weight.T if transposed else matrix.weight
        y, rows = x[0] @ W.T, []
        for place in range(sum(tokens)):
            row = y[place]
            for i, update in enumerate(updates):
                if update.matrix == k and update.tokens[0] <= place < update.tokens[1]:
                    more = update.scale * factors[2 * i + 1] @ (factors[2 * i] @ x[0, place])
                    if update.columns:
                        more = F.pad(more, (update.columns[0], outs[k] - update.columns[1]))
                    row = (row + more) * (gains[i] if gained else 1.0)
            rows.append(row if matrix.bias is None else row + matrix.bias)
        wanted.append(torch.stack(rows)[None])
    found = SameInput.apply(x, Group(tuple(matrices), tuple(updates)), *factors, *gains)
    assert not differing(found, tuple(wanted), [x, *factors, *gains])


@quick
@given(seed=seeds, act=st.sampled_from(sorted(ACTIVATIONS)), narrow=st.booleans(), wide=st.booleans())
def test_a_gated_mlp_is_its_formula(seed, act, narrow, wide):
    draw = Draw(seed)
    x, T = draw(1, 5, 6, grad=True), 5
    gate, up, down = draw(9, 6), draw(9, 6), draw(6, 9)
    first = [draw(2, 6, grad=True), draw(9, 2, grad=True), draw(2, 6, grad=True), draw(9, 2, grad=True)]
    second = [draw(3, 9, grad=True), draw(6, 3, grad=True)]
    updates = tuple(Update(k, 0.5, (0, T)) for k in (0, 1)) if wide else ()
    groups = Group((Matrix(gate), Matrix(up)), updates), Group((Matrix(down),), (Update(0, 2.0, (0, T)),) * narrow)
    factors = [*(first if wide else []), *(second if narrow else [])]
    f = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}[act]
    A1, B1, A2, B2 = first
    a, b = x @ gate.T, x @ up.T
    if wide:
        a, b = a + 0.5 * x @ A1.T @ B1.T, b + 0.5 * x @ A2.T @ B2.T
    h = f(a) * b
    wanted = h @ down.T + (2.0 * h @ second[0].T @ second[1].T if narrow else 0)
    assert not differing(GatedMLP.apply(x, *groups, ACTIVATIONS[act], *factors), wanted, [x, *factors])


@quick
@given(
    seed=seeds,
    lengths=st.lists(st.sampled_from([1, 2, 5, 63, 64, 65, SHORT, SHORT + 1, 150]), min_size=1, max_size=5),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
)
def test_attention_within_documents_is_that_of_each_alone(seed, lengths, heads, causal):
    draw, (many, few), dim = Draw(seed, torch.float32), heads, 8
    q, k, v = (draw(sum(lengths), count, dim, grad=True) for count in (many, few, few))
    pieces, start = [], 0
    for length in lengths:
        part = slice(start, start + length)
        states = (each[part].transpose(0, 1)[None] for each in (q, k, v))
        out = F.scaled_dot_product_attention(*states, is_causal=causal, scale=0.3, enable_gqa=True)
        pieces.append(out[0].transpose(0, 1))
        start += length
    where = layout(lengths, many, few, causal, torch.device("cpu"))
    assert not differing(Within.apply(q, k, v, where, causal, 0.3), torch.cat(pieces), [q, k, v], rel=2e-5)


def test_attention_refuses_what_are_not_the_documents_own_tokens():
    states = torch.randn(1, 2, 9, 4)
    with documents(Documents((4, 5))):
        for query, key in (
            (states, states[:, :, :7]),  # keys of something else
            (states[:, :, :7], states[:, :, :7]),  # a choice of the tokens
            (states.expand(2, -1, -1, -1), states.expand(2, -1, -1, -1)),  # another row
        ):
            with pytest.raises(NotImplementedError, match="no mask, no cache and no other row"):
                attention(torch.nn.Identity(), query, key, key, None)


@quick
@given(
    seed=seeds,
    rows=st.integers(1, 9),
    smooth=st.sampled_from([0.0, 0.2]),
    shape=st.sampled_from([Shape(), Shape(scale=0.4), Shape(scale=2.0, softcap=3.0)]),
    biased=st.booleans(),
    chunks=st.sampled_from([(1 << 24, 1 << 19), (40, 12)]),
)
def test_the_loss_at_labelled_rows_is_that_of_full_logits(seed, rows, smooth, shape, biased, chunks):
    draw, vocab = Draw(seed, torch.float32), 11
    h, W, b = draw(rows, 5, grad=True), draw(vocab, 5), draw(vocab) if biased else None
    wanted = torch.randint(0, vocab, (rows,), generator=draw.generator)
    weights = torch.rand(rows, generator=draw.generator) + 0.1
    logits = shape.scale * F.linear(h, W, b)
    logits = logits if shape.softcap is None else shape.softcap * torch.tanh(logits / shape.softcap)
    each = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=smooth)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head, "BUFFER", chunks[0])
        patched.setattr(head, "CACHED", chunks[1])
        total, nll = LabelledLoss.apply(h, W, b, wanted, weights, shape, smooth)
    torch.testing.assert_close(nll, each.detach(), rtol=1e-5, atol=1e-6)
    assert not differing(total, (each * weights).sum(), [h], rel=1e-5)


def test_rare_words_keep_their_part_of_the_gradient_in_fp16():
    draw, vocab, rows = Draw(0, torch.float32), 30_000, 512
    # Every word is as likely as any, and all pull the same way: without them the gradient is another.
    W = (1 + 0.02 * draw(vocab, 16)).half()
    wanted, weights = torch.randint(0, vocab, (rows,), generator=draw.generator), torch.full((rows,), 1 / rows)
    found = []
    for dtype in (torch.float16, torch.float32):
        h = (0.01 * draw(rows, 16)).to(dtype).requires_grad_()
        total, _ = LabelledLoss.apply(h, W.to(dtype), None, wanted, weights, Shape(), 0.0)
        (total * 2.0**14).backward()
        found.append(h.grad.float())
        draw = Draw(0, torch.float32)
        draw(vocab, 16)
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


@quick
@given(seed=seeds, shape=st.sampled_from([(3, 8), (1, 2, 5, 6)]))
def test_an_rms_norm_is_its_formula(seed, shape):
    draw = Draw(seed, torch.float32)
    x, w = draw(*shape, grad=True), draw(shape[-1])
    wanted = w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    assert not differing(RMSNorm.apply(x, w, 1e-6), wanted, [x], rel=1e-5)


@quick
@given(seed=seeds, heads=st.integers(1, 3))
def test_rotary_positions_are_a_turn_of_pairs(seed, heads):
    draw = Draw(seed)
    x, cos, sin = draw(1, 4, heads, 6, grad=True), draw(1, 4, 1, 6), draw(1, 4, 1, 6)
    turned = torch.cat((-x[..., 3:], x[..., :3]), -1)
    assert not differing(Rotary.apply(x, cos, sin), x * cos + turned * sin, [x])


@quick
@given(seed=seeds, counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), apart=st.booleans())
def test_a_product_of_each_expert_is_that_of_its_rows(seed, counts, apart):
    draw = Draw(seed)
    x, W = draw(sum(counts), 4, grad=True), draw(len(counts), 3, 4, grad=True)
    parts = [part @ W[e].T for e, part in enumerate(x.split(counts))]
    if sum(counts):
        assert not differing(grouped(x, W, counts, apart), torch.cat(parts), [x, W])


@quick
@given(seed=seeds, lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_dropout_is_replayed_and_belongs_to_the_document(seed, lengths):
    keys = tuple(range(10, 10 + len(lengths)))
    here, like = Documents(tuple(lengths), keys), torch.zeros(1)
    whole = here.kept(6, 0.4, 5, 0, sum(lengths), like)
    assert torch.equal(whole, here.kept(6, 0.4, 5, 0, sum(lengths), like))
    start = sum(lengths[:-1])
    alone = within_documents.Documents((lengths[-1],), keys[-1:]).kept(6, 0.4, 5, 0, lengths[-1], like)
    assert torch.equal(whole[start:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_weights_and_updates_are_rounded_once_whatever_memory_they_go_through(dtype, monkeypatch):
    monkeypatch.setattr(folding, "_ELEMENTS", 40)
    draw, sums = Draw(0, torch.float32), folding.Sums()
    for rows, columns in ((9, 7), (3, 50), (20, 11), (1, 13)):  # in blocks, a row wider than a block, after it narrower
        W, A, B = draw(rows, columns).to(dtype), draw(2, columns), draw(rows, 2)
        found = sums.into(torch.empty_like(W), W, A, B, 0.5)
        exact = W.double() + 0.5 * B.double() @ A.double()
        assert torch.equal(found, exact.to(dtype)) or (dtype == torch.float32 and torch.allclose(found, exact.float()))


@quick
@given(seed=seeds, rows=st.integers(1, 9), biased=st.booleans(), strided=st.booleans())
def test_a_few_rows_times_a_matrix_are_a_linear_layer(seed, rows, biased, strided):
    draw = Draw(seed)
    x, W, b = draw(rows, 7), draw(5, 7), draw(5) if biased else None
    x = draw(7, rows).T if strided else x
    found, wanted = few.linear(x, W, b), F.linear(x, W, b)
    assert found.shape == wanted.shape and found.is_contiguous()
    assert torch.allclose(found, wanted, rtol=1e-12)


def test_a_few_rows_go_another_way_only_where_a_large_fp32_matrix_on_a_cpu_is_faster_that_way(monkeypatch):
    monkeypatch.setattr(few, "_most", lambda threads: 16)
    large = torch.zeros(300, 300)
    assert few.most(large) == 16
    assert not any(few.most(each) for each in (large[:100], large.T[:, 1:], large.bfloat16(), large.to("meta")))
    monkeypatch.undo()
    for answers, wanted in (((True,), 64), ((False, False, True), 16), ((False,) * 5, 0)):
        told = iter(answers)
        monkeypatch.setattr(few, "pays", lambda usual, other, gain, told=told: next(told))
        few._most.cache_clear()
        assert few.most(large) == wanted
    few._most.cache_clear()
