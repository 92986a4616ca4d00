"""Files that are damaged, hostile or not what they are called: one clear error each, or content that is sound."""

from __future__ import annotations

import json
import os
import struct
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import save, write_gguf
from safetensors.torch import save_file

import lorica
from attacks.kinds import KINDS, Bench, sound
from lorica import Adapter, LoRA, LoricaError, formats, patterns
from lorica.formats import Contents, gguf_header, loralib, mlx, pair, peft
from lorica.models.checkpoint import read_folder
from lorica.models.loading import load
from lorica.train import state
from tiny import llama, stir


def contents(targets: str = "qv", method: LoRA | None = None) -> Contents:
    model = llama()
    lorica.inject(model, method or LoRA(r=2, alpha=4), targets)
    stir(model)
    adapter = Adapter.of(model, meta={"base_model": "tiny"})
    return Contents(adapter.method, adapter.targets, adapter.tensors, adapter.meta)


@pytest.fixture
def adapter(tmp_path):
    peft.write(tmp_path / "adapter", contents())
    return tmp_path / "adapter"


def configured(adapter, **changes):
    path = adapter / pair.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return adapter


def rewritten(adapter, change, **metadata):
    """The adapter with its tensors changed by `change`."""
    tensors, held = lorica.tensorfiles.read(adapter / pair.TENSORS)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(change(tensors), adapter / pair.TENSORS, metadata=held | metadata)
    return adapter


def told(action, *args) -> str:
    with pytest.raises(LoricaError) as fault:
        action(*args)
    return str(fault.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_a_clear_error_or_gives_sound_content(kind, tmp_path):
    bench = Bench(KINDS[kind], tmp_path)
    errors = []
    for number in range(12 if kind.startswith("model ") else 50):
        path = bench.damaged(f"test:{number}")
        try:
            bench.kind.read(path)
        except LoricaError as fault:
            errors.append(str(fault))
    assert len(errors) > 2 and max(map(len, errors)) < 20_000


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_no_bytes_whatever_make_an_adapter_crash(name, content, adapter):
    whole = (adapter / name).read_bytes()
    (adapter / name).write_bytes(content)
    with pytest.raises(LoricaError):
        formats.read(adapter)
    (adapter / name).write_bytes(whole)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lora_alpha": []}, r"lora_alpha is \[\]; it must be a finite number"),
        ({"r": 1e300}, "r is 1e.300; it must be a whole number"),
        ({"r": True}, "r is True"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 10**40}, "r is 1000000"),
        ({"target_modules": {}}, "target_modules is {}"),
        ({"target_modules": "("}, "target_modules: '\\(' is no regular expression"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '\\(' is no regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; it must be a list"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices is"),
        ({"lora_dropout": float("nan")}, "lora_dropout is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"bias": {}}, "bias is {}"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named(changes, said, adapter):
    with pytest.raises(LoricaError, match=said):
        formats.read(configured(adapter, **changes))


def test_all_settings_of_wrong_kinds_are_in_one_error(adapter):
    said = told(formats.read, configured(adapter, r=0, lora_alpha="x", peft_type="IA3", new_thing=[1]))
    assert all(word in said for word in ("r is 0", "lora_alpha is 'x'", "IA3", "new_thing"))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_without_end_is_stopped(key, adapter, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    rewritten(adapter, lambda tensors: {k.replace("q_proj", "a" * 60): t for k, t in tensors.items()})
    configured(adapter, target_modules=["a" * 60, "v_proj"], **{key: {"(a|aa)+$b": 2}})
    assert "took more than" in told(formats.read, adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named_with_what_to_do(value, adapter):
    def spoil(tensors):
        next(iter(tensors.values()))[0, 1] = value
        return tensors

    said = told(formats.read, rewritten(adapter, spoil))
    assert "not finite" in said and "1 of 64 elements" in said and "take an earlier save" in said


def test_a_header_that_promises_more_than_the_file_has_is_refused_before_anything_is_made(adapter):
    path = adapter / pair.TENSORS
    for length in (2**63, 2**40, 99 << 20, 0):
        path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(40))
        assert "damaged or not a safetensors file" in told(formats.read, adapter)


def test_a_pickle_under_the_name_of_safetensors_is_called_one(adapter):
    with zipfile.ZipFile(adapter / pair.TENSORS, "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    assert "a pickle under another name" in told(formats.read, adapter)


def test_sizes_that_no_tensor_has_are_refused(adapter):
    header = {"base_model.model.x.lora_A.weight": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (adapter / pair.TENSORS).write_bytes(struct.pack("<Q", len(text)) + text)
    assert "which no tensor has" in told(formats.read, adapter)


def test_tensors_without_elements_are_refused(adapter):
    said = told(formats.read, rewritten(adapter, lambda tensors: {key: each[:0] for key, each in tensors.items()}))
    assert "empty       base_model.model.model.layers.0" in said


def test_a_name_that_would_take_the_place_of_another_tensor_is_refused(adapter):
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    twice = {f"{path}.bias": torch.ones(3), f"{path}.base_layer.bias": torch.zeros(3)}
    forged = {f"{path}#lora.A": torch.ones(2, 32)}
    said = told(formats.read, rewritten(adapter, lambda tensors: tensors | twice | forged))
    assert "twice " in said and "unexpected  " + path + "#lora.A" in said


def test_a_rank_that_the_patterns_do_not_give_is_a_fault(adapter):
    said = told(formats.read, configured(adapter, rank_pattern={"k_proj": 3}, r=5))
    assert "its rank is 2, the config says 5" in said


@pytest.mark.parametrize("rows", [[-4, 4], [0, 10**9], [4, 4], [0.0, 4], "all", [[0], 4]])
def test_slices_that_are_no_rows_of_their_layer_are_refused(rows, adapter):
    ours = json.dumps({"slices": {"model.layers.0.self_attn.q_proj": {"q": rows, "k": [4, 8]}}})
    assert "are no ranges of its 32 rows" in told(formats.read, rewritten(adapter, dict, lorica=ours))


@pytest.mark.parametrize("slots", [["q", "q"], ["", "v"], ["a.b", "v"]])
def test_slots_without_names_of_their_own_are_refused(slots, tmp_path):
    save_file({"c_attn.lora_A": torch.ones(4, 8), "c_attn.lora_B": torch.ones(8, 2)}, tmp_path / "a.safetensors")
    said = told(lambda: loralib.read(tmp_path / "a.safetensors", 4.0, {"c_attn": slots}))
    assert "give each a name of its own" in said


def test_a_slice_without_a_name_is_refused(adapter):
    ours = json.dumps({"slices": {"model.layers.0.self_attn.q_proj": {"": [0, 16], "k": [16, 32]}}})
    assert "are no ranges of its 32 rows" in told(formats.read, rewritten(adapter, dict, lorica=ours))


@pytest.mark.parametrize(
    "ours",
    ["[]", '{"a": [1]}', '{"slices": 3}', "{", '{"stop_tokens": "3"}', '{"made_of": "[]"}', "[" * 5000],
    ids=lambda text: text[:20],
)
def test_metadata_of_the_wrong_kind_is_a_clear_error(ours, adapter):
    assert str(adapter) in told(formats.read, rewritten(adapter, dict, lorica=ours))


def test_targets_in_the_metadata_do_not_decide_what_is_applied(adapter):
    found = Adapter.load(rewritten(adapter, dict, lorica='{"target_modules": "not json"}'))
    found.apply(llama())
    assert json.loads(found.meta["target_modules"]) == ["q_proj", "v_proj"]


def test_an_odd_name_of_a_layer_is_matched_as_a_name_and_not_as_a_pattern(tmp_path):
    tensors = {"a(b.lora_a": torch.ones(4, 2), "a(b.lora_b": torch.ones(2, 4)}
    tensors |= {"c.lora_A": torch.ones(2, 4)}
    raw = {"a(b.lora_A": torch.ones(2, 4), "a(b.lora_B": torch.ones(4, 2)}
    raw |= {"c.lora_A": torch.ones(1, 4), "c.lora_B": torch.ones(4, 1)}
    save_file(raw, tmp_path / "a.safetensors")
    found = loralib.read(tmp_path / "a.safetensors", alpha=4)
    sound(found)
    assert [found.method.rank_of(target.path) for target in found.targets] == [2, 1]


def test_a_small_pickle_that_says_it_holds_a_huge_tensor_is_refused(tmp_path):
    huge = torch.zeros(1).expand(10**6, 10**6)
    torch.save({"x.lora_A": huge, "x.lora_B": huge}, tmp_path / "a.pt")
    assert "larger than what is stored" in told(lambda: loralib.read(tmp_path / "a.pt", 4.0, pickled=True))


def test_an_mlx_config_of_the_wrong_kinds_is_named(tmp_path):
    mlx.write(tmp_path / "a", contents())
    config = json.loads((tmp_path / "a" / mlx.CONFIG).read_text())
    config["lora_parameters"] |= {"rank": "8", "scale": []}
    (tmp_path / "a" / mlx.CONFIG).write_text(json.dumps(config))
    said = told(formats.read, tmp_path / "a")
    assert "rank is '8'" in said and "scale is []" in said


@pytest.mark.parametrize(
    "written, said",
    [
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "holds 9,223,372,036,854,775,808 pairs"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**62, 0), "tensors, for which it is too short"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**63) + b"x" * 40, "bytes of a string"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**60) + bytes(40), "elements"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(40), "list of type"),
        (struct.pack("<4sIQQ", b"GGUF", 77, 0, 0), "version 77"),
        (b"GGUF", "4 bytes"),
        (b"not a gguf file at all, though long", "does not begin with GGUF"),
    ],
)
def test_counts_of_a_gguf_that_do_not_fit_into_it_are_refused(written, said, tmp_path):
    (tmp_path / "a.gguf").write_bytes(written)
    assert said in told(gguf_header.check, tmp_path / "a.gguf")


def test_a_gguf_tensor_beyond_the_end_of_the_file_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    assert "bytes after the end of the file" in told(load, path)


def test_a_model_whose_config_asks_for_more_than_its_files_hold_is_refused_before_it_is_built(tmp_path):
    folder = save(tmp_path / "m")
    whole = json.loads((folder / "config.json").read_text())
    for changes, said in (
        ({"vocab_size": 10**9}, "its weights are"),
        ({"hidden_size": 10**6, "intermediate_size": 10**7}, "its weights are"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**10}, "num_labels is"),
        ({"attn_implementation": "somebody/kernel"}, "asks for code from elsewhere"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
        ({"hidden_size": []}, "cannot be loaded"),
    ):
        (folder / "config.json").write_text(json.dumps(whole | changes))
        assert said in told(read_folder, folder, torch.float32, "m"), changes


@pytest.mark.parametrize("part", ["../other.safetensors", "/etc/passwd", "absent.safetensors", 3])
def test_an_index_of_weights_names_files_beside_it_and_no_others(part, tmp_path):
    folder = save(tmp_path / "m")
    os.replace(folder / "model.safetensors", tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": part}}))
    assert "model.safetensors.index.json" in told(read_folder, folder, torch.float32, "m")


def test_a_state_whose_logs_are_shorter_than_it_says_is_refused(tmp_path):
    here = state.State(step=1, logs={"metrics.jsonl": 900})
    state.write(tmp_path, here, {"x": torch.ones(2)})
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert "metrics.jsonl has 3 bytes, and had 900" in told(state.read, tmp_path)


@pytest.mark.parametrize("what", ["folder", "device", "secret", "dangling"])
def test_what_cannot_be_opened_is_said_so(what, adapter, monkeypatch):
    path = adapter / pair.TENSORS
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "device":
        os.mkfifo(path)
    elif what == "dangling":
        path.symlink_to(adapter / "nothing")
    else:
        path.write_bytes(b"x")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    assert str(adapter) in told(formats.read, adapter)
