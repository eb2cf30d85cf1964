"""lm-eval's likelihood tasks through `local-completions` and by a folder's name, against sums by the guided model.

lm-eval brings thirty packages that nothing else here needs; where it is not installed the test is skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from builders.serving import TOKENIZER, running
from builders.tiny import save_member, tiny_model
from genarm import GuidedForCausalLM, compose

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
REPLIES = """\
task: tiny_reply
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "w1"
generation_kwargs: {{until: ["w99"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = [
    {"question": f"w{i} w{i + 1} w{i + 2}", "choices": [f"w{i + 3} w{2 * i}", "w30", "w31 w32 w33"], "answer": i % 3}
    for i in range(8)
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tokens"), [("tiny", True), ("tiny@cautious", True), ("tiny@helpful=-1", False)])
def test_lm_eval(tmp_path: Path, model: str, tokens: bool) -> None:
    lm_eval: Any = pytest.importorskip("lm_eval")
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    with running() as server:
        client = LocalCompletionsAPI(
            model=model,
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface",
            tokenized_requests=tokens,
            num_concurrent=3,
            max_length=100,
            batch_size=2,
        )
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(client, tasks=["tiny_choice"], task_manager=manager, log_samples=True)
        weights = server.service.names.resolve(model, None)
        samples = sorted(found["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
        correct = 0
        for row, sample in zip(QUESTIONS, samples, strict=True):
            expected = []
            for choice, reply in zip(row["choices"], sample["filtered_resps"], strict=True):  # type: ignore[call-overload]
                context = TOKENIZER(row["question"]).input_ids
                ids = TOKENIZER(f"{row['question']} {choice}").input_ids
                with torch.no_grad():
                    output = server.model(torch.tensor([ids]), reward_weights=weights, use_cache=False)
                rows = output.logits[0, len(context) - 1 : -1]
                target = torch.tensor(ids[len(context) :])
                expected.append(rows.gather(-1, target[:, None]).sum().item())
                assert float(reply[0]) == pytest.approx(expected[-1], abs=1e-3)
                assert str(reply[1]) == str(bool((rows.argmax(-1) == target).all()))  # whether greedy decoding says it
            correct += expected.index(max(expected)) == row["answer"]
        assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(correct / len(QUESTIONS))
        assert server.idle()


@pytest.mark.slow
def test_lm_eval_by_the_folders_name(tmp_path: Path) -> None:
    """Its own command, which never imports genarm, with a likelihood task and one of free replies."""
    pytest.importorskip("lm_eval")
    for seed, name in enumerate(("base", "arm")):
        save_member(tiny_model(seed=seed), tmp_path / name)
    compose(tmp_path / "base", {"good": tmp_path / "arm"}, tmp_path / "guided", weights={"good": 0.7})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "tiny_reply.yaml").write_text(REPLIES.format(data=tmp_path / "data.jsonl"))
    settings = f"pretrained={tmp_path / 'guided'},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", settings, "--device", "cpu"]
    command += ["--tasks", "tiny_choice,tiny_reply", "--include_path", str(tmp_path), "--batch_size", "3"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def samples(task: str) -> list[dict[str, Any]]:
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])

    model = GuidedForCausalLM.from_pretrained(tmp_path / "guided").eval()
    for row, sample in zip(QUESTIONS, samples("tiny_choice"), strict=True):
        context = TOKENIZER(row["question"]).input_ids
        for choice, reply in zip(row["choices"], sample["filtered_resps"], strict=True):  # type: ignore[call-overload]
            ids = TOKENIZER(f"{row['question']} {choice}").input_ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, len(context) - 1 : -1]
            expected = logits.gather(-1, torch.tensor(ids[len(context) :])[:, None]).sum().item()
            assert float(reply[0]) == pytest.approx(expected, abs=1e-3)
    for row, sample in zip(QUESTIONS, samples("tiny_reply"), strict=True):
        ids = torch.tensor([TOKENIZER(row["question"]).input_ids])
        reply = model.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
        assert sample["resps"][0][0].split() == TOKENIZER.decode(reply, skip_special_tokens=True).split()
