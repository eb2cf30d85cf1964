"""Trajectory rewards: scores against the head's value at one position of one unpadded sequence."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from builders.rewards import score_alone, tiny_reward
from builders.tiny import FAMILIES, VOCAB_SIZE, save_member, tiny_model, tiny_tokenizer
from genarm.errors import MemberError, VocabularyError
from genarm.lab import trajectory
from genarm.lab.trajectory import TrajectoryReward


def random_rows(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, VOCAB_SIZE) for _ in range(rng.randint(1, 12))] for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_in_the_order_given(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "TOKENS", 64)  # several batches
    reward = tiny_reward(family)
    prompts, replies = random_rows(20, 1), [[*row, 1] for row in random_rows(20, 2)]
    expected = [score_alone(reward, x + y) for x, y in zip(prompts, replies, strict=True)]
    assert reward.score(prompts, replies) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pad", [0, 1])
def test_prefix_scores_as_the_whole_does(family: str, pad: int) -> None:
    """With the padding <end>, as of GPT-2, a token is scored by the one before it wherever it is <end>."""
    reward, rng = tiny_reward(family, pad_token_id=pad), random.Random(family)

    def check(got: torch.Tensor, rows: list[list[int]]) -> None:
        assert got.dtype == torch.float32
        assert got.tolist() == pytest.approx([score_alone(reward, row) for row in rows], abs=1e-4)
        assert got.tolist() == pytest.approx(reward.score(rows, [[]] * len(rows)), abs=1e-4)

    prefix, rows = reward.prefix(), [[7, 8, 9], [10, 11, 12, 13, 14, 15], [16, 17]]
    check(prefix.extend(rows), rows)
    for number in range(12):
        # Four candidates for each row in one forward, ragged and some of them <end>, of which one is gone on with.
        prefix.select([i // 4 for i in range(12)])
        chunks = [[rng.choice([1, 1, 20, 21, 22, 23]) for _ in range(rng.randint(1, 3))] for _ in range(12)]
        candidates = [rows[i // 4] + chunk for i, chunk in enumerate(chunks)]
        check(prefix.extend(chunks), candidates)
        chosen = [4 * i + rng.randrange(4) for i in range(3)]
        prefix.select(chosen)
        rows = [candidates[i] for i in chosen]
        check(prefix.scores, rows)
        back = [rng.randint(0, len(chunks[i])) if number % 2 else 0 for i in chosen]
        prefix.rewind(back)
        rows = [row[: len(row) - count] for row, count in zip(rows, back, strict=True)]
        check(prefix.scores, rows)
        twin, branch = prefix.fork([1]), [*rows[1], 30, 1]
        check(twin.extend([[30, 1]]), [branch])
        if number % 3 == 0:
            prefix.replace([2], twin)
            rows[2] = branch
        check(prefix.scores, rows)


def test_load(tmp_path: Path) -> None:
    reward = tiny_reward()
    folder = save_member(reward.model, tmp_path / "reward")
    again = TrajectoryReward.load(str(folder), device="cpu", dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    rows = random_rows(4, 0)
    loaded = TrajectoryReward.load(str(folder))
    assert loaded.score(rows, rows) == reward.score(rows, rows)
    loaded.check(tiny_tokenizer())
    with pytest.raises(VocabularyError, match=f"the reward model in {folder} has other tokens than the policy"):
        loaded.check(tiny_tokenizer(words=[f"v{i}" for i in range(40)]))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(MemberError, match="cannot load the reward good from"):
        TrajectoryReward.load(str(tmp_path / "nothing"), name="good")
    policy = save_member(tiny_model(), tmp_path / "policy")
    with pytest.raises(
        MemberError,
        match=r"the reward model at .* score.weight are missing.* comes from genarm train --kind trajectory",
    ):
        TrajectoryReward.load(str(policy))
    config = AutoConfig.from_pretrained(policy, num_labels=2)
    two = save_member(AutoModelForSequenceClassification.from_config(config), tmp_path / "two")
    with pytest.raises(MemberError, match="is no trajectory reward model with one score"):
        TrajectoryReward.load(str(two))
    for pad in (None, -1, VOCAB_SIZE):
        with pytest.raises(MemberError, match="and a padding token; train one with"):
            tiny_reward("gpt2", pad_token_id=pad)
