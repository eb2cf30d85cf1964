"""docs/scaling.md: its arithmetic is done again here from the models' dimensions, and its commands are parsed.

`python tests/test_scaling_page.py` prints the page's tables.
"""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from genarm.cli.main import build_parser
from genarm.training.responses import CHUNK_ENTRIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")

GB = 1e9
BF16, FOUR_BIT = 2.0, 0.52  # bytes; 4 bits with a scale and a zero for every 128 weights
TRAINED = 16  # bytes: float32 weight, gradient and Adam's two averages
ROOM = 68 * GB  # of an 80 GB GPU, for weights, keys and values in vLLM
FITS = 72 * GB  # of an 80 GB GPU, in training
RANK = 8


@dataclass(frozen=True, kw_only=True)
class Model:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    head_dim: int = 128

    def layer(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def ends(self) -> int:
        """Embeddings, and the output layer if it has weights of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def parameters(self) -> int:
        return self.layers * (self.layer() + 2 * self.hidden) + self.hidden + self.ends()

    def weights(self, linear: float = BF16) -> float:
        """Bytes; embeddings, norms and the output layer stay in 16 bits."""
        matrices = self.layers * self.layer()
        return matrices * linear + (self.parameters() - matrices) * BF16

    def kv(self, gpus: int = 1) -> float:
        """Bytes per token on each GPU of tensor parallelism, which repeats heads where there are fewer than GPUs."""
        return 2 * self.layers * max(1.0, self.kv_heads / gpus) * self.head_dim * BF16

    def adapter(self) -> int:
        """Parameters of LoRA on all linear layers but the output layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = 2 * (self.hidden + queries) + 2 * (self.hidden + keys) + 3 * (self.hidden + self.intermediate)
        return self.layers * RANK * sides


MODELS = {
    "Llama 2 7B": Model(layers=32, hidden=4096, heads=32, kv_heads=32, intermediate=11008, vocabulary=32000),
    "Llama 2 13B": Model(layers=40, hidden=5120, heads=40, kv_heads=40, intermediate=13824, vocabulary=32000),
    "Llama 2 70B": Model(layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28672, vocabulary=32000),
    "Llama 3 8B": Model(layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocabulary=128256),
    "Llama 3 70B": Model(layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28672, vocabulary=128256),
    "TinyLlama 1.1B": Model(
        layers=22, hidden=2048, heads=32, kv_heads=4, intermediate=5632, vocabulary=32000, head_dim=64
    ),
    "Llama 3.2 1B": Model(
        layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256, head_dim=64, tied=True
    ),
}
SMALL = {name: "TinyLlama 1.1B" if name.startswith("Llama 2") else "Llama 3.2 1B" for name in MODELS}
BASES = [name for name in MODELS if SMALL[name] != name][:5]


def model_table() -> list[str]:
    rows = ["| model | parameters | bf16 | 4-bit | keys and values per token |", "|---|---|---|---|---|"]
    for name, m in MODELS.items():
        sizes = f"{m.weights() / GB:.1f} GB | {m.weights(FOUR_BIT) / GB:.1f} GB | {m.kv() / 1024:.0f} KiB"
        rows.append(f"| {name} | {m.parameters() / 1e9:.2f}B | {sizes} |")
    return rows


def room_for(base: Model, small: Model, gpus: int, linear: float, arm: str) -> str:
    """Tokens, in thousands, whose keys and values fit beside the weights; or no."""
    weights, kv = base.weights(linear), base.kv(gpus)
    if arm == "full":
        weights, kv = weights + small.weights(), kv + small.kv(gpus)
    elif arm == "lora":
        weights, kv = weights + base.adapter() * BF16, 2 * kv
    tokens = (ROOM - weights / gpus) / kv
    return f"{tokens / 1000:,.0f}k" if tokens > 4096 else "no"


def serving_table() -> list[str]:
    rows = ["| base | weights | ARM | 1 GPU | 2 GPUs | 8 GPUs |", "|---|---|---|---|---|---|"]
    for name in BASES:
        base, small = MODELS[name], MODELS[SMALL[name]]
        for dtype, linear in (("bf16", BF16), ("4-bit", FOUR_BIT)):
            for label, arm in (("none", ""), (f"full, {SMALL[name]}", "full"), ("LoRA on the base", "lora")):
                cells = " | ".join(room_for(base, small, n, linear, arm) for n in (1, 2, 8))
                rows.append(f"| {name} | {dtype} | {label} | {cells} |")
    return rows


def cost_table(streams: int = 16, context: int = 2048) -> list[str]:
    rows = [
        "| base | ARM | weights read | arithmetic | all bytes, 16 streams of 2,048 tokens |",
        "|---|---|---|---|---|",
    ]
    for name in BASES:
        base, small = MODELS[name], MODELS[SMALL[name]]
        ours, held = base.weights(), streams * context * base.kv()
        extra = streams * context * small.kv() + small.weights()
        ratio = small.parameters() / base.parameters()
        full = f"{1 + ratio:.2f}× | {1 + ratio:.2f}× | {1 + extra / (ours + held):.2f}×"
        adapter = base.adapter() * BF16
        lora = f"{1 + adapter / ours:.2f}× | 2× | {1 + (held + adapter) / (ours + held):.2f}×"
        rows += [f"| {name} | full, {SMALL[name]} | {full} |", f"| {name} | LoRA on the base | {lora} |"]
    return rows


def training_bytes(m: Model, how: str, gpus: int, pairs: int = 4, prompt: int = 512, response: int = 512) -> float:
    """Per GPU, with --bf16 and --gradient-checkpointing, split by FSDP from two GPUs on."""
    adapter = m.adapter()
    if how == "full":
        state, copy = m.parameters() * TRAINED, m.parameters() * BF16
    else:
        state = adapter * TRAINED + m.weights(FOUR_BIT if how == "QLoRA" else BF16)
        copy = adapter * BF16
    if how == "QLoRA":
        state += m.ends() * (4 - BF16)  # peft widens what is not in 4 bits
        gpus = 1  # every process holds the 4 bits whole
    # Under FSDP, two layers and both ends are whole at a time; alone, autocast keeps a copy of what is trained.
    held = copy if gpus == 1 else (2 * m.layer() + m.ends()) * BF16
    positions = pairs * (prompt + 2 * response)  # a packed row, in which each prompt stands once
    inputs = m.layers * m.hidden * BF16 * positions
    one_layer = (12 * m.hidden + 4 * m.kv_heads * m.head_dim + 8 * m.intermediate) * positions
    # What the output layer reads, and its slopes; of one chunk, logits and slopes as they are and in float32.
    outputs = 2 * 2 * pairs * (response + 1) * m.hidden * BF16 + 2 * CHUNK_ENTRIES * (BF16 + 4)
    return state / gpus + held + inputs + one_layer + outputs


RUNS = (
    ("Llama 3.2 1B", "full"),
    ("Llama 3 8B", "LoRA"),
    ("Llama 3 8B", "full"),
    ("Llama 2 13B", "LoRA"),
    ("Llama 2 13B", "full"),
    ("Llama 3 70B", "LoRA"),
    ("Llama 3 70B", "QLoRA"),
    ("Llama 3 70B", "full"),
)


def training_table() -> list[str]:
    rows = ["| what is trained | how | 1 GPU | 2 GPUs | 8 GPUs | 16 GPUs | 32 GPUs |", "|---|---|---|---|---|---|---|"]
    for name, how in RUNS:
        needs = [training_bytes(MODELS[name], how, n) for n in (1, 2, 8, 16, 32)]
        cells = " | ".join(f"{need / GB:,.0f} GB" if need <= FITS else f"~~{need / GB:,.0f} GB~~" for need in needs)
        rows.append(f"| {name} | {how} | {cells} |")
    return rows


@pytest.mark.parametrize("table", [model_table, serving_table, cost_table, training_table])
def test_tables_are_what_the_dimensions_give(table: object) -> None:
    expected = "\n".join(table())  # type: ignore[operator]
    assert expected in PAGE, f"the page should have\n{expected}"


def test_dimensions_give_the_published_sizes() -> None:
    """Parameters as counted in the released checkpoints."""
    published = {
        "Llama 2 7B": 6_738_415_616,
        "Llama 2 13B": 13_015_864_320,
        "Llama 2 70B": 68_976_648_192,
        "Llama 3 8B": 8_030_261_248,
        "Llama 3 70B": 70_553_706_496,
        "TinyLlama 1.1B": 1_100_048_384,
        "Llama 3.2 1B": 1_235_814_400,
    }
    assert {name: model.parameters() for name, model in MODELS.items()} == published


def test_worked_examples() -> None:
    eight, thirteen = MODELS["Llama 3 8B"], MODELS["Llama 2 13B"]
    assert "2 · 32 · 8 · 128 · 2 = 131,072 bytes" in PAGE
    assert eight.kv() == 131_072
    seventy = MODELS["Llama 3 70B"]
    two_nodes = (ROOM - seventy.weights() / 16) / (seventy.kv(8) / 2)  # pipeline stages of 40 layers
    assert f"room for {round(two_nodes / 1e4) * 10:,}k tokens on two nodes of 8, and for 1,230k on one" in PAGE
    chunk = 2 * CHUNK_ENTRIES * (BF16 + 4)
    assert f"one chunk of 2²⁴ entries, {chunk / 2**20:.0f} MiB" in PAGE
    table = 8 * 513 * eight.vocabulary * BF16
    assert f"8 · 513 · 128,256 · 2 = {table / GB:.2f} GB" in PAGE
    assert f"{eight.adapter() / 1e6:.0f} million parameters" in PAGE
    assert f"{eight.parameters() * TRAINED / GB:.0f} GB for 8B" in PAGE
    assert f"{thirteen.kv() * 4096 / GB:.1f} GB for one sequence of 4,096 tokens" in PAGE


def test_training_commands_parse() -> None:
    """What follows `-m genarm` is a command line of ours, and the launch configurations are there."""
    found = 0
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for option, value in itertools.pairwise(words):
                if option == "--config_file":
                    assert (ROOT / value).is_file()
            if "genarm" in words and words[0] != "genarm":
                build_parser().parse_args(words[words.index("genarm") + 1 :])
                found += 1
    assert found >= 4


if __name__ == "__main__":
    for table in (model_table, serving_table, cost_table, training_table):
        print("\n".join(table()), end="\n\n")
