"""The package's own promises: its names, its imports, its files."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import genarm
from genarm.errors import DataError
from genarm.files import new_folder, write_text


def test_public_names_are_sorted_and_there() -> None:
    assert genarm.__all__ == sorted(genarm.__all__)
    for name in genarm.__all__:
        assert getattr(genarm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Guided'; it has"):
        _ = genarm.Guided


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "genarm.lab", "genarm.engine")
    program = f"import sys, genarm; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_public_name_is_a_module_too() -> None:
    """Else `import genarm.NAME` would put the module in the place of what `from genarm import NAME` gives."""
    modules = {module.name for module in pkgutil.iter_modules(genarm.__path__)}
    assert not modules & set(genarm.__all__)
    assert len(modules - {"__main__"}) <= 16


SIGNATURES = {
    "ArmTrainer": "(model, args, *, beta, train_pairs, eval_pairs=None, callbacks=None)",
    "Completion": "(*, text, tokens, ending, prompt_tokens, reused_tokens, drafted, accepted)",
    "Engine": "(model, tokenizer, options=None, *, draft=None, draft_tokenizer=None)",
    "Engine.from_pretrained": "(reference, options=None, *, dtype='auto', device=None, draft=None, "
    "trust_remote_code=False)",
    "Engine.generate": "(self, asked, *, sampling=None, weights=None, seed=0, stop=())",
    "Engine.stream": "(self, request)",
    "EngineOptions": "(*, streams=8, context=None, speculate=8, adapt=True, chunk=256, wishes=4)",
    "GuidedForCausalLM": ("(config, members=None, alignments=None, folder=None)"),
    "GuidedForCausalLM.from_members": "(base, rewards, *, references=None, wishes=None, weights=None, tokenizers=None)",
    "GuidedForCausalLM.with_wishes": "(self, wishes, *, weights=None)",
    "GuidedForCausalLM.encode": "(self, prompts, *, wishes=None, tokenizer=None, reading)",
    "Request": "(*, prompt, weights, max_kl=None, wishes=(), contexts, sampling, seed=0, stop=(), stop_token_ids=(), "
    "ignore_eos=False, top_log_probs=0, prompt_log_probs=None, reply=True, continues=False, reading)",
    "Sampling": "(*, max_new_tokens=128, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, "
    "presence_penalty=0.0, frequency_penalty=0.0, logit_bias, min_new_tokens=0)",
    "Token": "(*, id, text, log_prob, base, rewards, top=(), kl=None, offset=0)",
    "TokenRewards": "(*, tokens, token_ids, base, rewards, guided, weights, differences=())",
    "TrainConfig": (
        "(*, model, data='', output, kind='arm', rewards=None, revision=None, trust_remote_code=False, "
        "chat_template=None, loss=None, through=None, through_weight=None, start=None, wish=None, prompts=None, "
        "raw=False, split='train', objective=None, eval_data=None, eval_split=None, "
        "eval_fraction=0.05, template_arg=(), max_prompt_tokens=None, max_response_tokens=None, lora=False, "
        "lora_rank=8, lora_alpha=16, lora_dropout=None, lora_targets='all-linear', head=None, load_in_4bit=False, "
        "beta=None, generations=None, epochs=1.0, max_steps=None, learning_rate=None, schedule='cosine', "
        "warmup=0.03, batch_size=8, accumulation=4, weight_decay=0.0, max_grad_norm=1.0, bf16=False, "
        "gradient_checkpointing=False, seed=0, eval_steps=None, save_steps=None, early_stopping=None, "
        "report_to='none')"
    ),
    "compose": (
        "(base, rewards, output, *, drop=(), tuned=None, references=None, wishes=None, weights=None, "
        "descriptions=None, adapter_models=None, settings=None, bundle=False, trust_remote_code=False)"
    ),
    "train": "(config, *, resume=False, console=None)",
}


def shape(name: str) -> str:
    """Parameters with their kinds and defaults; a default that is made anew each time is left out."""
    found: Any = genarm
    for part in name.split("."):
        found = getattr(found, part)
    made = inspect.signature(found)
    plain = [
        p.replace(annotation=p.empty, default=p.empty if type(p.default).__name__ in _FRESH else p.default)
        for p in made.parameters.values()
    ]
    return str(made.replace(parameters=plain, return_annotation=made.empty))


_FRESH = ("_HAS_DEFAULT_FACTORY_CLASS", "Reading")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name: str) -> None:
    """Programs rely on these: to remove or rename one is a decision, not an accident."""
    assert shape(name) == SIGNATURES[name]


def test_all_public_names_have_a_frozen_signature() -> None:
    assert {name for name in SIGNATURES if "." not in name} == set(genarm.__all__) - {
        "GenarmError",
        "GuidedConfig",
        "__version__",
    }


def test_written_text_is_whole_or_not_there(tmp_path: Path) -> None:
    """A reader that looks all the time sees one of the two texts, never a part."""
    path, texts = tmp_path / "file", ["a" * 200_000, "b" * 100_000]
    write_text(path, texts[0])
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_text(path, texts[i % 2])
    done.set()
    reader.join()
    assert seen <= set(texts)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_new_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]
    with pytest.raises(DataError, match="already exists"), new_folder(tmp_path / "out"):
        pass


def test_no_test_imports_another_and_the_folders_are_those_of_the_source() -> None:
    """What tests share is in `builders`."""
    here = Path(__file__).parent
    modules = list(here.rglob("test_*.py"))
    names = {path.stem for path in modules}
    assert len(names) == len(modules)
    for path in [*modules, *(here / "builders").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                found = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert not names & set(found), f"{path.relative_to(here)} imports {found}"
    folders = {path.parent.relative_to(here).as_posix() for path in modules} - {".", "with_vllm"}
    assert folders <= {path.name for path in Path(genarm.__file__).parent.iterdir()}
