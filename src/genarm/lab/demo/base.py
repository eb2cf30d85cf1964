"""The demo's base model: a word-level tokenizer and a small Llama, trained from scratch on a crowd's replies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import TaskID
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from genarm.data.tables import FORBID
from genarm.lab.demo.world import Request, all_requests, all_sentences, write_reply
from genarm.terminal import Bar
from genarm.text.prompts import as_conversation, encode_pair

PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Shape and training of a base model; a weak and a strong one differ in these alone.

    Attributes:
        layers, hidden, heads: of the Llama.
        replies: how many replies of the crowd are written; each is seen once.
        batch_size: replies per step.
        learning_rate: its peak.
    """

    __pydantic_config__ = FORBID

    layers: PositiveInt = 2
    hidden: PositiveInt = 128
    heads: PositiveInt = 4
    replies: PositiveInt = 9_000
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 4e-3


def build_tokenizer() -> PreTrainedTokenizerBase:
    """A word-level tokenizer that knows every word of the world, keeps spaces and has a chat template."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")])
    texts = [*all_sentences(), *(request.text for request in all_requests())]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokens = [PAD, UNKNOWN, END, *ROLES, *words]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_base(
    output: Path, requests: Sequence[Request], *, settings: BaseSettings, seed: int, console: Console
) -> int:
    """Train a Llama from scratch on a crowd's replies to `requests`; `output` is then an ordinary model folder.

    Returns:
        Its number of parameters.
    """
    tokenizer = build_tokenizer()
    set_seed(seed)
    model = _new_model(tokenizer, settings)
    with Bar(console=console) as progress:
        trainer = Trainer(
            model=model,
            args=_training_arguments(output, settings, seed),
            train_dataset=_examples(tokenizer, requests, settings.replies, seed),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[_Bar(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model.num_parameters()


def _new_model(tokenizer: PreTrainedTokenizerBase, settings: BaseSettings) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=3 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _training_arguments(output: Path, settings: BaseSettings, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        seed=seed,
        use_cpu=True,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _examples(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], count: int, seed: int
) -> list[dict[str, list[int]]]:
    """`count` encoded requests, each with a reply by somebody of the crowd; the reply alone is learnt."""
    rng = random.Random(f"base {seed}")
    examples = []
    for request in rng.choices(requests, k=count):
        prompt, reply = encode_pair(tokenizer, as_conversation(request.text), write_reply(rng, request))
        examples.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return examples


class _Bar(TrainerCallback):
    """Shows how far training is, and its loss."""

    def __init__(self, progress: Bar) -> None:
        self.progress = progress
        self.task: TaskID = progress.add_task("training the base", total=None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss."""
        if logs and "loss" in logs:
            self.progress.update(self.task, description=f"training the base, loss {float(logs['loss']):.2f}")
