"""Mixed rows: every way to compute them gives what each token alone gives."""

from __future__ import annotations

import pytest
import torch

import lorica
from laws import close
from lorica import Adapter, LoRA
from lorica.errors import LoricaError
from lorica.kernels import few, mixed
from lorica.serve.ragged import Bags, Ragged
from lorica.serve.rows import Layers
from lorica.serve.stack import Rows, Up
from serving import base, merged, prompt
from tiny import stir


def factors(ranks, into=24, out=40):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(r, into, generator=generator), torch.randn(r, out, generator=generator)) for r in ranks]


def inputs(tokens, into=24, out=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, into, generator=generator), torch.randn(tokens, out, generator=generator)


def test_the_masked_pair_gives_what_each_token_alone_gives():
    made = factors([2, 5, 64, 8])
    owners = [3, 0, -1, 2, 1, 1, 3, -1]
    x, y = inputs(len(owners))
    wanted = mixed.reference(y, x, owners, [A for A, _ in made], [B for _, B in made])
    A, B = torch.cat([A for A, _ in made]), torch.cat([B for _, B in made])
    mixed.masked(y, x, A, B, mixed.mask_of(owners, [2, 5, 64, 8], x))
    assert close(y, wanted)


def test_stacked_products_give_what_each_token_alone_gives():
    made = factors([6] * 5)
    x, y = inputs(5)
    wanted = mixed.reference(y, x, range(5), [A for A, _ in made], [B for _, B in made])
    A, B = torch.stack([A for A, _ in made]), torch.stack([B for _, B in made])
    mixed.stacked_up(y, mixed.stacked_down(x, A), B)
    assert close(y, wanted)


@pytest.mark.parametrize("ranks", [[2, 5, 64, 8], [8, 16], [1, 1, 3, 9, 2]])
def test_ragged_products_give_what_each_token_alone_gives(ranks):
    """As `Ragged` places them, of two layers that read one input; some rows lie empty between adapters."""
    x, y = inputs(len(ranks))
    made = [factors(ranks), [(A.flip(1), B.flip(0)) for A, B in factors(ranks)]]
    wanted = [mixed.reference(y, x, range(len(ranks)), *zip(*layer, strict=True)) for layer in made]
    rows = [
        Rows({0: torch.cat([A0, A1])}, {3: Up(0, len(A0), B0), 4: Up(len(A0), 2 * len(A0), B1)}, (), len(A0), 0)
        for (A0, B0), (A1, B1) in zip(*made, strict=True)
    ]
    ragged = Ragged({0: [3, 4]})
    for some in (rows, rows[1:], rows[:1] + rows[2:], rows[::-1]):
        there = [rows.index(each) for each in ragged.place(some)]
        s = ragged.downs[0].of(x[there])
        for layer, index in enumerate((3, 4)):
            out = y[there]
            ragged.ups[index].onto(out, s, None)
            assert close(out, wanted[layer][there])


def test_adapters_of_many_ranks_stay_where_they_are_until_too_much_lies_empty():
    def rows(r):
        return Rows({0: torch.randn(r, 24)}, {0: Up(0, r, torch.randn(r, 40))}, (), r, 0)

    ragged = Ragged({0: [0]})
    small, middle, large = rows(8), rows(32), rows(64)
    ragged.place([small, middle, large])
    A, kept = ragged.downs[0].A, ragged.downs[0].A.clone()
    ragged.place([large, middle])  # one piece of thirteen is empty
    assert ragged.downs[0].A.shape == A.shape and torch.equal(ragged.downs[0].A, kept)
    ragged.place([large])  # five of thirteen: moved to the front
    assert len(ragged.downs[0].A) == 8 and torch.equal(ragged.downs[0].A.view(64, 24), large.downs[0])
    assert ragged.downs[0].A.data_ptr() == A.data_ptr()  # in the same memory


@pytest.mark.gpu
def test_the_masked_pair_is_captured_in_a_graph_and_follows_its_inputs():
    made = [(A.cuda(), B.cuda()) for A, B in factors([2, 5, 64, 8])]
    A, B = torch.cat([A for A, _ in made]), torch.cat([B for _, B in made])
    x, y = (each.cuda() for each in inputs(8))
    owners = [[3, 0, -1, 2, 1, 1, 3, -1], [0, 0, 0, 1, 2, 3, -1, 2]]
    mask, kept, out = mixed.mask_of(owners[0], [2, 5, 64, 8], x), y.clone(), y.clone()
    mixed.masked(out, x, A, B, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(kept)
        mixed.masked(out, x, A, B, mask)
    for each in owners:
        mask.copy_(mixed.mask_of(each, [2, 5, 64, 8], x))
        graph.replay()
        wanted = mixed.reference(kept, x, each, [A for A, _ in made], [B for _, B in made])
        assert close(out, wanted, 1e-3)


@pytest.mark.gpu
def test_an_adapter_comes_to_the_device_while_a_step_is_running_there():
    adapter = Adapter.of(merged()["dora"])
    layers, wanted = Layers(base().cuda()), Layers(base()).rows(adapter)
    layers.rows(adapter)  # once before, since new memory waits for the device
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # about a second on the stream of the steps
    step = torch.cuda.Event()
    step.record()
    rows = layers.rows(adapter)
    assert not step.query()
    found = [each.cpu() for each in (*rows.downs.values(), *(up.B for up in rows.ups.values()))]
    for ours, theirs in zip(found, (*wanted.downs.values(), *(up.B for up in wanted.ups.values())), strict=True):
        assert close(ours, theirs)


@pytest.fixture(scope="module")
def layers():
    return Layers(base())


def rows_of(layers, names):
    return {name: layers.rows(Adapter.of(merged()[name])) for name in names}


@pytest.mark.parametrize("way", ["products", "few rows", "masked"])
@pytest.mark.parametrize(
    "parts",
    [
        [("r2", 5)],
        [("qv", 1), ("qv2", 1), ("qv3", 1)],
        [(None, 3), ("qv", 1), ("rslora", 7), ("qv3", 1), ("patterns", 2), ("qv", 4), ("qv2", 1)],
        [("head", 1), ("qv", 1), (None, 1), ("r64", 1), ("qv2", 1), ("patterns", 1), ("rslora", 9)],
        [("dora", 1), ("qv", 1), (None, 1), ("dora2", 1), ("qv2", 1)],
        [("qv", 2), ("dora", 3), (None, 1)],
        [("rslora", 1), ("qv", 1), ("r2", 1), (None, 1), ("qv2", 1), ("dora", 1), ("patterns", 1)],
    ],
    ids=["one", "stacked", "prefill and decode", "every kind", "magnitudes stacked", "magnitudes", "ragged"],
)
def test_a_mixed_forward_gives_what_each_part_alone_gives_on_merged_weights(layers, parts, way, monkeypatch):
    monkeypatch.setattr(layers, "masked", way == "masked")  # as on a GPU
    direct, linear = [], few.linear
    monkeypatch.setattr(few, "most", lambda W: 64 * (way == "few rows"))
    monkeypatch.setattr(few, "linear", lambda *given: direct.append(given) or linear(*given))
    made = rows_of(layers, {name for name, _ in parts if name})
    plan = layers.plan([(made.get(name), count) for name, count in parts])
    ordered = [parts[place] for place in plan.order]
    tokens = [prompt(place, count) for place, (_, count) in enumerate(ordered)]
    with layers.attached(), torch.no_grad():
        layers.work = plan.work
        flat = torch.tensor([[id] for ids in tokens for id in ids])  # every token a sequence of its own
        logits = layers.model(input_ids=flat).logits[:, 0]
        layers.idle()
    assert bool(direct) == (way == "few rows")
    start = 0
    for (name, count), ids in zip(ordered, tokens, strict=True):
        with torch.no_grad():
            wanted = merged()[name](input_ids=torch.tensor(ids)[:, None]).logits[:, 0]
        assert close(logits[start : start + count], wanted, 3e-5), name
        start += count


def test_tokens_of_two_ranks_at_the_same_layers_lie_ragged_and_those_of_one_rank_stacked(layers):
    made = rows_of(layers, ["r2", "rslora", "qv", "qv2"])
    work = layers.plan([(rows, 1) for rows in made.values()]).work
    _, ups, _ = next(each for each in work if each and len(each[1]) == 2)  # q or v
    assert [(type(up), start, stop) for _, start, stop, up in ups] == [(Bags, 0, 2), (Up, 2, 4)]


def test_slots_stay_full_and_right_while_adapters_come_and_go(layers):
    made = rows_of(layers, ["qv", "qv2", "qv3"])
    ids = torch.tensor([[7]])
    for names in (["qv", "qv2", "qv3"], ["qv3", "qv"], ["qv2", "qv3"], ["qv", "qv2", "qv3"], ["qv2", "qv"]):
        plan = layers.plan([(made[name], 1) for name in names])
        with layers.attached(), torch.no_grad():
            layers.work = plan.work
            logits = layers.model(input_ids=ids.repeat(len(names), 1)).logits[:, 0]
            layers.idle()
        for row, place in enumerate(plan.order):
            with torch.no_grad():
                wanted = merged()[names[place]](input_ids=ids).logits[0, 0]
            assert close(logits[row], wanted, 3e-5)


def test_without_an_adapter_in_the_batch_the_base_is_itself_to_the_bit(layers):
    ids = torch.tensor([prompt(0, 9)])
    with torch.no_grad():
        before = layers.model(input_ids=ids).logits
        with layers.attached():
            layers.work = layers.plan([(None, 9)]).work
            assert torch.equal(layers.model(input_ids=ids).logits, before)
        assert torch.equal(layers.model(input_ids=ids).logits, before)


def test_what_cannot_be_mixed_is_refused_with_every_reason(layers):
    model = base()
    lorica.inject(model, LoRA(r=2, modules_to_save=["norm"]), "q_proj,embed_tokens")
    stir(model)
    with pytest.raises(LoricaError) as fault:
        layers.rows(Adapter.of(model))
    assert "embed_tokens" in str(fault.value) and "norm.weight" in str(fault.value)
    other = base("phi3")
    lorica.inject(other, LoRA(r=2), "all-linear")
    stir(other)
    with pytest.raises(LoricaError, match="no linear layer"):
        layers.rows(Adapter.of(other))


def test_a_layer_that_sees_some_of_the_tokens_only_cannot_be_mixed():
    """Its rows are not the batch's rows, so whose they are is not known."""
    model = base()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x[:, 1:])) * mlp.up_proj(x[:, 1:])).mean(1, True)
    adapter = Adapter.of(merged()["r64"])
    with pytest.raises(LoricaError) as fault:
        Layers(model).rows(adapter)
    told = str(fault.value)
    assert told.count("see every token") == 3 and "layers.1.mlp.up_proj" in told and "layers.0" not in told
