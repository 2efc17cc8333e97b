"""A tokenizer of one's own, from the text to the model that others load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from scripts import export_model, generate, prepare_data
from tests.processes import run_python
from tests.sample_models import FAMILIES
from tests.utils.models.test_tokenizer import TEXT, write_tokenizer
from utils.base.errors import ExitCode
from utils.checkpoints.layout import read_json

Train = Callable[..., int]
MARKS = "<s> $A </s>"
END = 2  # its </s>


def prepare(folder: Path) -> Path:
    """Make data of a tokenizer that marks begin and end; return their directory."""
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    write_tokenizer(folder / "tokenizer", settings, MARKS)
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"{number} {TEXT}"}) + "\n" for number in range(40))
    )
    words = ["--input", str(folder / "documents.jsonl"), "--output", str(folder / "data")]
    words += ["--tokenizer", str(folder / "tokenizer"), "--token-cache", "off", "--quiet"]
    assert prepare_data.main(words) == 0
    return folder / "data"


def train(run_train: Train, data: Path, *settings: str) -> Path:
    """Train two steps on these data; return the checkpoint."""
    words = ("--config", "test", "--max-steps", "2", "--quiet")
    assert run_train(*words, settings=(f"data_uri={data}", "report_to=[]", *settings)) == 0
    return next(data.parent.glob("run/checkpoints/*step2-*"))


def test_a_tokenizer_that_marks_texts_is_followed_from_the_text_to_the_export(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, pipeline

    data = prepare(tmp_path)
    checkpoint = train(run_train, data)
    given = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    own = tokenizers.Tokenizer.from_str(given.decode())
    plain = own.encode("the fox", add_special_tokens=False).ids

    ids = np.load(data / "train_00000.npz")["input_ids"]
    assert (data / "tokenizer.json").read_bytes() == given
    assert (checkpoint / "tokenizer.json").read_bytes() == given
    assert 1 not in ids
    assert own.decode(ids[: ids.tolist().index(END)].tolist()).endswith(TEXT)

    for name in ("config.json", "generation_config.json"):
        found = read_json(checkpoint / name)
        assert (found["bos_token_id"], found["eos_token_id"]) == (END, END)

    capsys.readouterr()
    words = ("--prompt", "the fox", "--json", "--max-tokens", "1", "--device", "cpu")
    assert generate.main([str(checkpoint), *words]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1 + len(plain)

    target = tmp_path / "export"
    assert export_model.main([str(checkpoint), "--output", str(target), "--device", "cpu"]) == 0
    config = read_json(target / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (END, END)
    assert config.get("pad_token_id") is None
    exported: Any = AutoTokenizer.from_pretrained(target)
    assert exported("the fox").input_ids == [END, *plain]
    write = pipeline("text-generation", model=str(target), device="cpu")
    texts = write(["the fox", "It"], batch_size=2, max_new_tokens=2, do_sample=False)
    assert [len(text) for text in texts] == [1, 1]


def test_shards_without_an_index_give_a_model_without_an_end_token(
    run_train: Train, sample_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "bare"
    data.mkdir()
    for shard in sample_data.glob("*.npz"):
        shutil.copy(shard, data)
    checkpoint = train(run_train, data)

    for name in ("config.json", "generation_config.json"):
        found = read_json(checkpoint / name)
        assert (found.get("bos_token_id"), found.get("eos_token_id")) == (None, None)


def test_a_model_that_reads_tokenizers_by_rules_of_its_own_is_refused(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepare(tmp_path)
    (tmp_path / "qwen2.json").write_text(json.dumps({**LLAMA, "model_type": "qwen2"}))

    settings = (f"data_uri={data}", f"model={tmp_path / 'qwen2.json'}")
    code = run_train("--config", "test", "--max-steps", "2", settings=settings)

    assert code == ExitCode.PREFLIGHT
    assert "For a model of type qwen2, transformers reads" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/checkpoints/*"))


# Without their dependencies, which would bring torch once more.
TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
found = {"version": transformers.__version__}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the fox", add_special_tokens=False).input_ids
    found[folder] = {"ids": ids, "pad": tokenizer.pad_token}
    if folder == sys.argv[1]:
        continue
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.arange(30).reshape(1, 30)).logits
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = write(["the fox", "It"], batch_size=2, max_new_tokens=4, do_sample=False)
    found[folder] |= {"logits": logits[0, :, ::64].flatten().tolist(), "texts": len(texts)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the variables of a process that has transformers 4."""
    site = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
    done = subprocess.run(
        [*command, *TRANSFORMERS_4], capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        pytest.skip(f"transformers 4 cannot be installed: {done.stderr.strip()[-300:]}")
    return {"PYTHONPATH": str(site)}


LLAMA = {
    **FAMILIES["mistral"],
    "model_type": "llama",
    "num_key_value_heads": 4,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
NEOX = ("model_overrides.rotary_pct=0.5", "model_overrides.rotary_emb_base=50000")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_data_checkpoint_and_export_are_the_same_to_transformers_4(
    family: str, run_train: Train, transformers_4: dict[str, str], tmp_path: Path
) -> None:
    data = prepare(tmp_path)
    (tmp_path / "llama.json").write_text(json.dumps(LLAMA))
    settings = NEOX if family == "gpt_neox" else (f"model={tmp_path / 'llama.json'}",)
    checkpoint = train(run_train, data, *settings)
    target = tmp_path / "export"
    assert export_model.main([str(checkpoint), "--output", str(target), "--device", "cpu"]) == 0
    # Names of weights in a checkpoint are those that Accelerator.load_state needs; GPT-NeoX has
    # others in files of the Hub, which transformers 4 does not find there.
    models = [target] if family == "gpt_neox" else [checkpoint, target]

    def read(environment: dict[str, str]) -> dict[str, Any]:
        done = run_python("-c", READ, data, *models, HF_HUB_OFFLINE="1", **environment)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    found, expected = read(transformers_4), read({})
    assert found.pop("version") == "4.57.6"
    assert expected.pop("version").startswith("5.")
    for folder in (data, *models):
        own, other = found[str(folder)], expected[str(folder)]
        assert own.pop("logits", []) == pytest.approx(other.pop("logits", []), abs=1e-4)
        assert own == other
        assert (own["pad"], own.get("texts", 2)) == ("</s>", 2)
