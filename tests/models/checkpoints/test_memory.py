"""Loading holds little beside the arrays that stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 8192,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
}
SLACK = 12e6
"""Bytes: what the interpreter and its threads take meanwhile, with a part of the programs' own memory."""

WRITE = """
import jax
from dynamoe.models.checkpoints import as_pretrained, save_pretrained
from dynamoe.models.checkpoints.fields import Fields
from dynamoe.models.checkpoints.registry import family_of
fields = Fields(CONFIG)
model = family_of(fields).decoder(fields).build(jax.random.key(0), stacked=False)
save_pretrained(as_pretrained(model, CONFIG), PATH)
"""
LOAD = """
import re
from pathlib import Path
import jax
from flax import nnx
from dynamoe.models.checkpoints import from_pretrained, open_published

def status(name):
    return 1024 * int(re.search(rf"{name}:\\\\s+(\\\\d+) kB", Path("/proc/self/status").read_text())[1])

from_pretrained(SMALL)  # what a first call loads and compiles
largest = max(entry.bytes for entry in open_published(PATH).source.entries.values())
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
model = from_pretrained(PATH).model
resident = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
print(status("VmHWM") - before - resident, largest, resident)
"""


def run(program: str, **names: object) -> str:
    text = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + program.replace("\\\\", "\\")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process is not told here")
def test_beside_the_resident_arrays_stand_two_of_the_largest_tensor(tmp_path: Path) -> None:
    path, small = str(tmp_path / "model"), str(Path(__file__).parent / "fixtures" / "olmoe")
    run(WRITE, CONFIG=CONFIG, PATH=path)
    beside, largest, resident = map(int, run(LOAD, PATH=path, SMALL=small).split())
    assert resident > 2 * largest + SLACK + 20e6  # so that a whole copy would show
    assert beside <= 2 * largest + SLACK
