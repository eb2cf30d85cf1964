"""What decides the rows of a comparison, by content: what is trained, answers, and judges' scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from genarm.lab.evaluation.answers import Answers
from genarm.lab.evaluation.prompts import Question
from genarm.lab.evaluation.recipe import Recipe, TrainSpec
from genarm.lab.judges.kinds import JUDGES, JudgeSpec
from genarm.lab.methods.interface import MethodSpec
from genarm.lab.methods.models import Models
from genarm.lab.training.rlhf import parse_rewards
from genarm.provenance import AT, Record, content_of, data_record, file_content, plain
from genarm.training.losses.distil import read_wish


def training_record(spec: TrainSpec, models: Models) -> Record:
    """A model to train: its settings, and what it starts and learns from."""
    named = {key: models.resolve(value) for key, value in spec.settings.items() if isinstance(value, str)}
    record: Record = {"settings": {key: value for key, value in spec.settings.items() if key not in _FILES}}
    record |= {key: models.record(spec.settings[key]) for key in ("model", "through") if key in named}
    record |= {key: data_record(named[key]) for key in ("data", "eval_data", "prompts") if key in named}
    if "wish" in named:
        record["wish"] = read_wish(str(spec.settings["wish"]))
    if "rewards" in named:
        rewards = parse_rewards(named["rewards"])
        record["rewards"] = {reward.name: models.record(reward.folder) for reward in rewards}
        record["weights"] = {reward.name: reward.weight for reward in rewards}
    if "chat_template" in named:
        record["chat_template"] = {AT: named["chat_template"], "content": file_content(Path(named["chat_template"]))}
    return plain(record)


_FILES = ("model", "through", "data", "eval_data", "prompts", "wish", "rewards", "chat_template")


def answers_record(recipe: Recipe, method: MethodSpec, models: Models, questions: Sequence[Question]) -> Record:
    """The replies of `method`, whatever it is called; equal exactly where two recipes would give the same ones."""
    spec = recipe.prompts
    is_text = method.table == "wishes"
    own = {
        "kind": method.kind,
        "weights": dict(method.weights),
        "settings": dict(method.settings),
        "sampling": dict(method.sampling),
        **{role: models.record(reference) for role, reference in method.roles.items()},
        "named": {name: text if is_text else models.record(text) for name, text in method.named.items()},
    }
    # What a method has none of is left out, as older records do not know it.
    if method.references:
        own["references"] = {name: models.record(reference) for name, reference in method.references.items()}
    if method.kind == "genarm" and (starts := models.starts(method)):
        own["starts"] = starts
    if method.system is not None:
        own["system"] = method.system
    return plain(
        {
            "seed": recipe.seed,
            "sampling": asdict(recipe.sampling),
            "method": own,
            "base": models.record(recipe.methods[0].base),
            "prompts": {AT: spec.data, "number": len(questions), "text": content_of(q.prompt for q in questions)},
            "tokens of the prompts": content_of(q.ids for q in questions),
        }
    )


def scores_record(
    judge: JudgeSpec, method: str, models: Models, questions: Sequence[Question], answers: Answers
) -> Record:
    """A judge's scores of the replies of one method."""
    return plain(
        {
            "judge": {"kind": judge.kind, **JUDGES[judge.kind].scores(judge.source, models).record},
            "rows of the prompts": content_of((q.prompt, dict(q.row)) for q in questions),
            f"replies of {method}": content_of(zip(answers.replies, answers.token_ids, strict=True)),
        }
    )
