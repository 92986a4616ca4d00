"""What serving engines take: PEFT's layout with one rank and one scale, and the command line that starts each.

vLLM reads the rank, alpha, target names and use_rslora of a config and drops every other key, so an adapter with
patterns of ranks or alphas would load with the wrong scale and no word of it. SGLang and Ray Serve (which runs vLLM)
take the same folder. Ollama takes a GGUF adapter and a Modelfile. Written from what the engines' code and documents say
they read; PEFT and llama.cpp were run on such files, these engines were not.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from lorica import doors
from lorica.errors import LoricaError
from lorica.files import write_atomic
from lorica.formats import Contents, pair, peft
from lorica.formats.updates import contents_of, one_rank, updates

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be


def write(folder: Path, contents: Contents, dtype: str = "fp32") -> list[str]:
    """Write a folder that vLLM, SGLang and PEFT read alike; returns what had to be changed to fit."""
    found, notes = one_rank(updates(contents, "vLLM's LoRA"))
    rank = max(update.rank for update in found.values())
    if rank > VLLM_RANKS[-1]:
        raise LoricaError(f"its rank is {rank}, and vLLM takes at most {VLLM_RANKS[-1]}: merge it instead")
    peft.write(folder, contents_of(found, contents.meta, contents.method.dropout), dtype)
    return notes


def room(folder: Path) -> int:
    """The smallest --max-lora-rank that holds the adapter in a folder that `write` made."""
    rank = doors.json_object(folder / pair.CONFIG).get("r", 8)
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def vllm_line(base: str, name: str, folder: Path) -> str:
    """The command that serves it with vLLM."""
    start = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(room(folder))]
    return shlex.join([*start, "--lora-modules", f"{name}={folder}"])


def sglang_line(base: str, name: str, folder: Path) -> str:
    """The command that serves it with SGLang."""
    start = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
    return shlex.join([*start, "--max-lora-rank", str(room(folder)), "--lora-paths", f"{name}={folder}"])


def write_ray(folder: Path, base: str, name: str) -> str:
    """Write the configuration of a Ray Serve application beside an adapter at `folder/name`; returns its text.

    Ray loads adapters from a bucket (s3 or gs), one folder for each: its address is for the user to put in.
    """
    text = f"""# Copy {name}/ to BUCKET/loras/{name}/, put its address below, then: serve run serve.yaml
# Ask for the model "base:{name}".
applications:
- name: llm
  route_prefix: /
  import_path: ray.serve.llm:build_openai_app
  args:
    llm_configs:
    - model_loading_config:
        model_id: base
        model_source: {json.dumps(base)}
      lora_config:
        dynamic_lora_loading_path: s3://BUCKET/loras
        max_num_adapters_per_replica: 16
      engine_kwargs:
        enable_lora: true
        max_lora_rank: {room(folder / name)}
"""
    write_atomic(folder / "serve.yaml", text)
    return text


def write_modelfile(folder: Path, base: str, adapter: str, stops: list[str]) -> str:
    """Write Ollama's Modelfile beside the GGUF adapter `adapter`; returns its text."""
    lines = [
        "# The base: a .gguf file, a folder of safetensors, or a name that `ollama list` shows. It must be the model",
        "# that the adapter was trained on.",
        f"FROM {base}",
        f"ADAPTER ./{adapter}",
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
    ]
    text = "\n".join(lines) + "\n"
    write_atomic(folder / "Modelfile", text)
    return text
