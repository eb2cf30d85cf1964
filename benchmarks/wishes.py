r"""Wishes on a real chat model: what words do at several weights, and within budgets, and what they garble.

    scripts/real-model .real-model
    python benchmarks/wishes.py prompts PROMPTS.jsonl requests.jsonl
    genarm generate .real-model --wish brief=… (all five; the first command prints it) --input requests.jsonl \
        --output replies.jsonl
    pip install textstat==0.7.3 vaderSentiment "setuptools<81"
    python benchmarks/wishes.py measure replies.jsonl

Five wishes at weights from -1 to 4, at weight 4 within two budgets, and the same words as a plain system message: each
over the same prompts, one reply each. What a wish asks for is measured by rules (words, exclamation marks,
contractions) and by judges that nobody here has trained (the Flesch reading ease of `textstat`, the sentiment of
`vaderSentiment`); how far a reply went from the model, in nats per token; and garbling by the share of words that stand
in no prompt and in no other reply of the plain model, with and without a system message.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from genarm.statistics import mean

WISHES = {
    "brief": "Answer in one short sentence.",
    "formal": "You write in a very formal, polite and impersonal style, as in a letter of a ministry.",
    "cheerful": "You are extremely enthusiastic and cheerful!",
    "simple": "Use only short, simple words and short sentences that a small child understands.",
    "calm": "Never use exclamation marks.",
}
WEIGHTS = (-1.0, 0.5, 1.0, 2.0, 4.0)
BUDGETS = (0.1, 0.5)
"""Nats per token, at the largest weight."""
COUNT, LONGEST = 100, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    prompts = parts.add_parser("prompts", help="write the requests")
    prompts.add_argument("source", type=Path, help='JSONL with "prompt", a text')
    prompts.add_argument("output", type=Path)
    measured = parts.add_parser("measure", help="print the tables")
    measured.add_argument("replies", type=Path)
    options = parser.parse_args()
    if options.part == "prompts":
        write_requests(options.source, options.output)
    else:
        print("\n\n".join(tables(options.replies)))


def write_requests(source: Path, output: Path) -> None:
    """Every setting over the first short prompts; and the command that answers them."""
    texts = [json.loads(line)["prompt"] for line in source.read_text(encoding="utf-8").splitlines()]
    texts = [text for text in texts if len(text) <= LONGEST][:COUNT]
    silent = dict.fromkeys(WISHES, 0.0)
    with output.open("w", encoding="utf-8") as file:

        def write(setting: str, wish: str, text: str, **more: Any) -> None:
            row = {"prompt": text, "setting": setting, "wish": wish, "text": text, "reward_weights": silent, **more}
            file.write(json.dumps(row) + "\n")

        for text in texts:
            write("w = 0", "", text)
            for wish, words in WISHES.items():
                system = [{"role": "system", "content": words}, {"role": "user", "content": text}]
                write("prompted", wish, text, prompt=system)
                for w in WEIGHTS:
                    write(f"w = {w:g}", wish, text, reward_weights={**silent, wish: w})
                for budget in BUDGETS:
                    setting = f"w = {max(WEIGHTS):g}, at most {budget} nats"
                    weights = {**silent, wish: max(WEIGHTS)}
                    write(setting, wish, text, reward_weights=weights, max_kl=budget)
    words = " ".join(f'--wish {name}="{text}"' for name, text in WISHES.items())
    how = "--max-new-tokens 96 --temperature 0.7 --seed 0"
    print(f"genarm generate .real-model {words} --input {output} --output replies.jsonl {how}")


def tables(replies: Path) -> Iterator[str]:
    """A table for each wish: what it asks for, and what it costs, by setting."""
    rows = [json.loads(line) for line in replies.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["wish"], row["setting"]].append(row)
    asked_words = {word for row in rows for word in words_of(row["text"])}
    plain = [row for (_, setting), group in groups.items() if setting in ("w = 0", "prompted") for row in group]
    said_by = Counter(word for row in plain for word in {*words_of(row["response"])})

    def strange(row: dict[str, Any]) -> float:
        """Words that nobody else has said, in percent."""
        others = 1 if row["setting"] in ("w = 0", "prompted") else 0
        said = words_of(row["response"])
        return 100 * sum(w not in asked_words and said_by[w] <= others for w in said) / max(1, len(said))

    for wish in WISHES:
        asked = measures()[wish]
        settings = [("", "w = 0"), *(key for key in groups if key[0] == wish)]
        order = sorted(settings, key=lambda key: (key[1] == "prompted", "nats" in key[1], number(key[1])))
        lines = [f"**{wish}**: “{WISHES[wish]}”", ""]
        heads = [*asked, "words of its own, %", "nats per token"]
        lines += ["| setting | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for key in order:
            group = groups[key]
            cells = [shown([measure(row["response"]) for row in group]) for measure in asked.values()]
            cells += [shown([strange(row) for row in group])]
            far = shown([row["kl"] / max(1, row["tokens"]) for row in group])
            cells += ["" if key[1] == "prompted" else far]
            lines.append(f"| {key[1]} | " + " | ".join(cells) + " |")
        yield "\n".join(lines)


def measures() -> dict[str, dict[str, Callable[[str], float]]]:
    """What each wish is measured by."""
    import textstat
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    sentiment = SentimentIntensityAnalyzer()

    def marks(text: str) -> float:
        return float(text.count("!"))

    def words(text: str) -> float:
        return float(len(words_of(text)))

    def pleasure(text: str) -> float:
        return float(sentiment.polarity_scores(text)["compound"])

    def letters(text: str) -> float:
        return len("".join(words_of(text))) / max(1.0, words(text))

    def ease(text: str) -> float:
        return float(textstat.flesch_reading_ease(text))

    def informal(text: str) -> float:
        """Contractions and exclamation marks per 100 words."""
        return 100 * (len(re.findall(r"\w'(?:s|re|ve|ll|d|m|t)\b", text)) + marks(text)) / max(1.0, words(text))

    return {
        "brief": {"words": words},
        "formal": {"contractions and “!” in 100 words": informal, "reading ease": ease},
        "cheerful": {"“!” in a reply": marks, "sentiment": pleasure},
        "simple": {
            "reading ease": ease,
            "letters in a word": letters,
        },
        "calm": {"“!” in a reply": marks, "replies with any, %": lambda text: 100.0 * ("!" in text)},
    }


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[^\W\d_]+", text.replace("’", "'").lower())


def number(setting: str) -> float:
    """The first number in a setting, or 0."""
    found = re.search(r"-?\d+(?:\.\d+)?(?= nats)|(?<== )-?[\d.]+$", setting)
    return float(found.group()) if found else 0.0


def shown(values: list[float]) -> str:
    """A mean with its interval."""
    found = mean(values)
    return f"{found.value:.2f}" if found.low != found.low else f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main()
