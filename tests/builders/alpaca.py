"""What alpaca_eval is told of an annotator."""

from __future__ import annotations

import math

from builders.judge_server import Act, Seen


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def weigh(seen: Seen, number: int) -> Act:
    """Log-probabilities by length, for whichever output is shown as m and as M."""
    small, large = (part.split('"""')[1] for part in seen.question.split('"output": ')[1:3])
    p = sigmoid(len(small) - len(large))
    tops = [{"token": token, "logprob": math.log(q), "bytes": None} for token, q in (("m", p), ("M", 1 - p))]
    first = {**tops[0], "top_logprobs": tops}
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": "m"},
        "logprobs": {"content": [first]},
    }
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice]}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    return Act(body={**body, "usage": usage}, headers={"Content-Type": "application/json"})
