"""Prefix-embedding and prefix-layer tuning: where special tokens go, what acts, what learns, and what it costs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import lorica
from lorica import LoricaError, evaluate, patch, plan
from lorica.data import Example, collate
from lorica.insertion import Insertion, asked, edited, insertion, positions
from lorica.methods.prefix import LoRAPrefixEmbedding, LoRAPrefixLayer, PrefixEmbedding, PrefixLayer
from lorica.passes import Passes
from tiny import MODELS, VOCAB, bert, gpt2, llama, logits, stir

METHODS = {
    "embedding": PrefixEmbedding(3, 2),
    "layer": PrefixLayer(3, 2),
    "lora+embedding": LoRAPrefixEmbedding(3, 2, rank=2),
    "lora+layer": LoRAPrefixLayer(3, 2, rank=2),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [30, 31]]
EXAMPLES = [
    Example([5, 6, 7, 8, 9], [False, False, False, True, True], "a"),
    Example([11, 12, 13, 14, 15, 16, 17, 18], [False] * 6 + [True] * 2, "b"),
    Example([21, 22, 23, 24, 25, 26], [False, False, True, False, False, True], "two answers"),
]


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        num_labels=3, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()


def deberta():
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        num_labels=3, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"],
        position_buckets=8, type_vocab_size=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config).eval()


ENCODERS = {"bert": bert, "roberta": roberta, "deberta": deberta}


def tokenizer():
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t63"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


TOK = tokenizer()


def equipped(make, method, seed=0):
    model = make()
    torch.manual_seed(seed)
    lorica.inject(model, method)
    stir(model)
    return model


def grads(model):
    return {key: parameter.grad.clone() for key, parameter in patch.trainable(model).items()}


def loss_of(model, examples):
    """The model's own loss of padded examples, as it reads them: a sum over their labels."""
    read = [piece for pieces in edited(model, examples) for piece in pieces]
    labels = sum(sum(piece.loss) for piece in read)
    return model(**collate(read, 0)).loss * labels


def test_a_prefix_stands_before_the_prompt_and_an_infix_after_it():
    own = Insertion(first=64, prefix=3, infix=2)
    assert own.prompt([5, 6]) == [64, 65, 66, 5, 6, 67, 68]
    (found,) = own.examples(EXAMPLES[0])
    assert found.ids == [64, 65, 66, 5, 6, 7, 67, 68, 8, 9]
    assert found.loss == [False] * 8 + [True] * 2
    assert found.where == "a"


def test_an_infix_stands_before_each_answer_as_the_model_will_meet_it():
    first, second = Insertion(64, 1, 1).examples(EXAMPLES[2])
    assert first.ids == [64, 21, 22, 65, 23]
    assert second.ids == [64, 21, 22, 23, 24, 25, 65, 26]
    assert (first.loss, second.loss) == ([False] * 4 + [True], [False] * 7 + [True])
    (whole,) = Insertion(64, 1, 0).examples(EXAMPLES[2])
    assert whole.loss == [False, *EXAMPLES[2].loss]


def test_text_without_a_prompt_has_no_place_for_an_infix():
    text = Example([5, 6, 7], [False, True, True], "rows:1")
    with pytest.raises(LoricaError, match="rows:1 is learnt from its beginning.*--infix 0"):
        Insertion(64, 1, 1).examples(text)
    assert Insertion(64, 1, 0).examples(text)[0].ids == [64, 5, 6, 7]


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_the_first_token_of_an_encoder_stays_first(make):
    model = equipped(make, PrefixLayer(2, 1))
    assert asked(model, [[2, 6, 7, 3]]) == [[2, 64, 65, 6, 7, 3, 66]]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "phi3"])
def test_taking_it_off_gives_the_base_to_the_bit(name, method):
    model = MODELS[name]()
    before, weights, prompt = logits(model), copy.deepcopy(model.state_dict()), [PROMPTS[1]]
    answered = _answers(model, prompt)
    lorica.inject(model, method)
    stir(model, size=0.5)
    assert not torch.equal(_answers(model, asked(model, prompt)), answered)
    with lorica.disabled(model):
        assert asked(model, prompt) == prompt
        assert torch.equal(_answers(model, asked(model, prompt)), answered)
    lorica.eject(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def _answers(model, prompts):
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompts)).logits[:, -1]


@pytest.mark.parametrize("make", [llama, gpt2, *ENCODERS.values()])
def test_counts_are_those_of_section_5_1(make):
    model = make()
    d, depth = model.config.hidden_size, model.config.num_hidden_layers
    for method, count in ((PrefixEmbedding(3, 2), d * 5), (PrefixLayer(3, 2), depth * d * 5)):
        lorica.inject(model, method)
        assert lorica.count(model).trainable == count
        lorica.eject(model)


def test_gradients_reach_every_row_and_nothing_else():
    for make in (llama, gpt2):
        for method in METHODS.values():
            model = equipped(make, method)
            loss_of(model, EXAMPLES).backward()
            own = {id(parameter) for parameter in lorica.trainable(model).values()}
            for key, parameter in lorica.trainable(model).items():
                assert parameter.grad.abs().amax(-1).gt(0).all() or "lora" in key, key
                assert parameter.grad.abs().max() > 0, key
            assert all(id(each) in own or each.grad is None for each in model.parameters())


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("method", [METHODS["embedding"], METHODS["layer"]], ids=["embedding", "layer"])
def test_an_encoder_learns_every_row(make, method):
    model = equipped(make, method)
    ids = torch.tensor(asked(model, [[2, 6, 7, 8, 3], [2, 9, 10, 11, 3]]))
    model(input_ids=ids).logits[:, 0].pow(2).sum().backward()
    for key, parameter in lorica.trainable(model).items():
        assert parameter.grad.abs().amax(-1).gt(0).all(), key
    base = make()
    lorica.eject(model)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_pack_and_a_padded_batch_give_what_each_example_alone_gives(make, method):
    model = equipped(make, method)
    read = [piece for pieces in edited(model, EXAMPLES) for piece in pieces]
    sum(loss_of(model, [example]) for example in EXAMPLES).backward()
    wanted = grads(model)
    passes = Passes(model, read, 0)
    assert passes.way == "packed"
    for attempt in (lambda: _packed(model, passes, read), lambda: loss_of(model, EXAMPLES).backward()):
        model.zero_grad()
        attempt()
        for key, gradient in grads(model).items():
            assert (gradient - wanted[key]).abs().max() <= 1e-5 * wanted[key].abs().max(), key


def _packed(model, passes, read):
    with passes(model, read, weights=[1.0] * len(read)) as (loss, _):
        loss.backward()


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("layers", [False, True])
def test_activations_computed_again_are_those_of_their_own_pass(make, layers):
    model = equipped(make, (PrefixLayer if layers else PrefixEmbedding)(3, 2))
    ids, other = (torch.tensor([[*row[:3], *asked(model, [row])[0], 7, 8]]) for row in ([5, 6, 7, 8], [9, 10, 11, 12]))
    other = other.flip(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()

    def both():
        model.zero_grad()
        losses = [model(input_ids=each).logits.pow(2).mean() for each in (ids, other)]
        with torch.no_grad():
            model(input_ids=ids.roll(1, 1))
        sum(losses).backward()
        return grads(model)

    wanted = both()
    plan.checkpoint(model)
    found = both()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_embeddings_hold_no_special_tokens_whatever_was_read_before():
    model = equipped(llama, PrefixLayer(3, 2))
    ids = torch.tensor(asked(model, [PROMPTS[1]]))
    given = llama().get_input_embeddings()(ids % VOCAB)
    model(input_ids=ids).logits.sum().backward()
    found = model(inputs_embeds=given).logits
    assert torch.equal(found, llama()(inputs_embeds=given).logits)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_cached_generation_in_a_batch_gives_what_each_prompt_alone_gives(method):
    model = equipped(llama, method)
    together = evaluate.generate(model, TOK, PROMPTS, max_new=6, batch=4)
    assert together == [evaluate.generate(model, TOK, [ids], max_new=6)[0] for ids in PROMPTS]
    for ids, text in zip(PROMPTS, together, strict=True):
        (row,) = asked(model, [ids])
        said = []
        for _ in range(6):
            said.append(int(_answers(model, [row + said]).argmax()))
            if said[-1] in evaluate.stop_ids(model, TOK):
                said.pop()
                break
        assert text == TOK.decode(said)
        assert "".join(evaluate.stream(model, TOK, ids, max_new=6)) == text


def test_step_zero_of_a_prefix_alone_is_that_of_the_tokens_its_rows_were_taken_from():
    for make in (llama, gpt2):
        model = make()
        torch.manual_seed(4)
        ids = torch.randint(VOCAB, (3,)).tolist()
        wanted = _answers(model, [ids + PROMPTS[1]])
        for kind in (PrefixEmbedding, PrefixLayer):
            torch.manual_seed(4)
            lorica.inject(model, kind(3, 0))
            assert torch.allclose(_answers(model, asked(model, [PROMPTS[1]])), wanted, atol=1e-6)
            lorica.eject(model)


def test_the_first_token_of_an_answer_depends_on_the_prompt_beneath_a_replaced_infix():
    model = equipped(llama, PrefixLayer(2, 2))
    first, second = (_answers(model, asked(model, [ids])) for ids in ([5, 6, 7], [8, 9, 10]))
    assert (first - second).abs().max() > 1e-3


def test_a_second_adapter_starts_from_the_base_and_each_has_its_own_tokens():
    model = equipped(llama, PrefixLayer(3, 2))
    said = _answers(model, asked(model, PROMPTS[:1]))
    torch.manual_seed(1)
    lorica.inject(model, PrefixLayer(1, 1), name="second")
    alone = llama()
    torch.manual_seed(1)
    lorica.inject(alone, PrefixLayer(1, 1))
    found, wanted = patch.trainable(model, "second"), patch.trainable(alone)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert insertion(model).size == 2
    patch.select(model, "default")
    assert torch.equal(_answers(model, asked(model, PROMPTS[:1])), said)


def test_losses_count_each_label_once_whatever_an_infix_makes_of_an_example():
    model = equipped(llama, PrefixEmbedding(2, 1))
    found = evaluate.loss(model, EXAMPLES)
    assert [count for _, count in found.per_row] == [2, 2, 2]
    assert found.rows == 3
    alone = [loss_of(model, [example]).item() for example in EXAMPLES]
    assert [nats for nats, _ in found.per_row] == pytest.approx(alone, rel=1e-5)


def test_rows_longer_than_the_table_of_positions_are_refused():
    assert (positions(gpt2()), positions(bert()), positions(roberta()), positions(llama())) == (1024, 512, 38, None)
    model = equipped(gpt2, PrefixEmbedding(8, 8))
    long = Example([5] * 1010, [False] * 1000 + [True] * 10, "rows:7")
    with pytest.raises(LoricaError, match=r"1 of 4 rows .* 16 special .* 1,024 positions .*rows:7.*--max-len 1,024"):
        evaluate.loss(model, [*EXAMPLES, long])
    with pytest.raises(LoricaError, match="no room"):
        evaluate.generate(model, TOK, [[5] * 1010], max_new=4)


def test_it_cannot_be_merged_and_says_why():
    model = equipped(llama, PrefixEmbedding(2, 1))
    with pytest.raises(LoricaError, match="prefix-embedding cannot be merged, since its special tokens"):
        lorica.merge(model)


def test_what_takes_no_prefix_is_refused():
    with pytest.raises(LoricaError, match="T5ForConditionalGeneration takes no prefix"):
        lorica.inject(MODELS["t5"](), PrefixEmbedding())
    with pytest.raises(LoricaError, match="one must be above 0"):
        PrefixEmbedding(0, 0)
    config = transformers.AlbertConfig(
        vocab_size=VOCAB, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    with pytest.raises(LoricaError, match="runs 3 blocks and holds 1.*prefix-embedding works"):
        lorica.inject(transformers.AlbertForMaskedLM(config), PrefixLayer())
