"""One contestant of `genarm bench train`, in a process of its own: an ordinary run of its trainer, round by round."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genarm.errors import ConfigError, GenarmError
from genarm.lab.bench.figures import TRAIN_CPO, TRAIN_DPO, TRAIN_PACKED, TRAIN_PADDED, TRAIN_REFERENCE
from genarm.lab.bench.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import Trainer

    from genarm.training.kinds import Setup

CONTESTANTS = (TRAIN_PACKED, TRAIN_PADDED, TRAIN_CPO, TRAIN_REFERENCE, TRAIN_DPO)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process trains; `output` is a folder for what it leaves."""

    settings: TrainSettings
    contestant: str
    output: Path


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained, and on what.

    Attributes:
        parameters, of_all: that are trained, and that there are.
        tokens: of a round's pairs, each prompt once.
        sequence_tokens: of their sequences, each of which has its prompt.
        device: the kind that it runs on.
        threads: of torch.
    """

    parameters: int
    of_all: int
    tokens: int
    sequence_tokens: int
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the process (of the GPU, where there is one): before the first step, and at most in a round."""

    before: int
    peak: int


class Training:
    """A contestant in its process, from here."""

    def __init__(self, job: Job, pipe: Connection) -> None:
        self._job = job
        self._pipe = pipe
        self.trained = Trained(**self._answer())
        self.memory = Memory(before=0, peak=0)

    def run(self, number: int) -> float:
        """Train for the round `number`; returns seconds per step."""
        self._pipe.send(number)
        answer = self._answer()
        if number:  # the warm-up is not counted
            self.memory = Memory(before=answer["before"], peak=max(self.memory.peak, answer["peak"]))
        return float(answer["seconds"])

    def _answer(self) -> Mapping[str, Any]:
        try:
            problem, content = self._pipe.recv()
        except EOFError:
            raise ConfigError(
                f"the process that trained {self._job.contestant} has ended, for want of memory perhaps; give a "
                "smaller --batch-size"
            ) from None
        if problem:
            raise ConfigError(f"{self._job.contestant}: {problem}")
        found: Mapping[str, Any] = content
        return found


@contextmanager
def training(job: Job) -> Iterator[Training]:
    """Start a contestant, and end it.

    Raises:
        ConfigError: it cannot be trained.
    """
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    process = spawning.Process(target=_main, args=(there, job), name=job.contestant)
    process.start()
    there.close()
    try:
        yield Training(job, here)
    finally:
        here.close()
        process.kill()  # it waits for the next round, and has nothing to save
        process.join()


# --- in the other process ---------------------------------------------------------------------------------------------


def _main(pipe: Connection, job: Job) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # standard output is for the figures
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        _train(pipe, job)
    except GenarmError as error:
        pipe.send((str(error), None))
    except EOFError:  # whoever asks has left
        return


def _train(pipe: Connection, job: Job) -> None:
    import torch
    from torch.utils.data import SequentialSampler

    from genarm.training.sharding import parameter_counts

    setup = _setup(job)
    trainer: Any = _MAKERS[job.contestant](setup)
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.add_callback(_rounds(pipe, job.settings, trainer.args.device))
    pairs = setup.data.training
    trained, of_all = parameter_counts(trainer.model)
    responses = [len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    prompts = [len(pair.prompt_ids) for pair in pairs]
    facts = Trained(
        parameters=trained,
        of_all=of_all,
        tokens=sum(responses) + sum(prompts),
        sequence_tokens=sum(responses) + 2 * sum(prompts),
        device=trainer.args.device.type,
        threads=torch.get_num_threads(),
    )
    pipe.send((None, asdict(facts)))
    trainer.train()


def _setup(job: Job) -> Setup:
    """As `genarm train` would have it, without evaluations, checkpoints and a log; a round is an epoch."""
    import dataclasses

    from transformers import set_seed

    import genarm.lab.training  # noqa: F401 (so that dpo is among the kinds)
    from genarm.training.arguments import training_options
    from genarm.training.config import TrainConfig
    from genarm.training.data import load_pairs
    from genarm.training.kinds import Setup, find_kind
    from genarm.training.loading import load_tokenizer, resolve
    from genarm.training.output import RunFolder

    find_kind("dpo").require()
    settings = job.settings
    config = resolve(
        TrainConfig(
            model=settings.model,
            data=settings.data,
            output=job.output,
            loss="reference" if job.contestant == TRAIN_REFERENCE else None,
            lora=settings.lora,
            lora_dropout=0.0,
            eval_fraction=0.0,
            batch_size=settings.batch_size,
            accumulation=1,
            bf16=settings.bf16,
            gradient_checkpointing=settings.gradient_checkpointing,
            seed=settings.seed,
        )
    )
    tokenizer = load_tokenizer(config)
    data = load_pairs(config, tokenizer)
    count = settings.steps * settings.batch_size
    if len(data.training) < count:
        raise ConfigError(f"--data has {len(data.training)} pairs, and a round takes {count}; give fewer --steps")
    options = training_options(config, RunFolder(path=job.output), evaluations=0, resuming=False) | {
        "num_train_epochs": settings.rounds + 1,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    set_seed(config.seed)
    pairs = dataclasses.replace(data, training=data.training[:count])
    return Setup(config=config, tokenizer=tokenizer, data=pairs, options=options, callbacks=[])


def _rounds(pipe: Connection, settings: TrainSettings, device: Any) -> Any:
    """Waits before each epoch until it is told to go on, and says afterwards how long it took."""
    from transformers import TrainerCallback

    from genarm.lab.bench.timing import clock
    from genarm.lab.machine import give_back

    class Rounds(TrainerCallback):
        before, began = 0, 0.0

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            if pipe.recv() == 0:
                self.before = _memory(device, peak=False)
            _forget_peak(device)
            self.began = clock(device)

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            seconds = (clock(device) - self.began) / settings.steps
            answer = {"seconds": seconds, "before": self.before, "peak": _memory(device, peak=True)}
            give_back()  # the other contestants wait with theirs
            pipe.send((None, answer))

    return Rounds()


def _memory(device: Any, *, peak: bool) -> int:
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM" if peak else "VmRSS"].split()[0])


def _forget_peak(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew


def _ours(setup: Setup) -> Trainer:
    from genarm.training.kinds import kind_of

    return kind_of(setup.config).make_trainer(setup)


def _padded(setup: Setup) -> Trainer:
    trainer: Any = _ours(setup)
    trainer.ways = [way for way in trainer.ways if not way.packed]
    return trainer


def _dpo(setup: Setup) -> Trainer:
    from genarm.training.kinds import find_kind

    return find_kind("dpo").make_trainer(setup)


def _cpo(setup: Setup) -> Trainer:
    """trl's trainer of the same loss: CPO's without its likelihood term."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from genarm.lab.training.trainers import Baseline
    from genarm.training.loading import load_model

    class OnTokens(Baseline, CPOTrainer):
        def tokenize_row(self, feature: Mapping[str, Sequence[int]], model: Any = None) -> dict[str, Any]:
            prompt, found = feature["ids"], {"prompt_input_ids": feature["ids"]}
            found["prompt_attention_mask"] = [1] * len(prompt)
            for side in ("chosen", "rejected"):
                whole = [*prompt, *feature[f"{side}_ids"]]
                found[f"{side}_input_ids"] = whole
                found[f"{side}_attention_mask"] = [1] * len(whole)
                found[f"{side}_labels"] = [-100] * len(prompt) + list(feature[f"{side}_ids"])
            return found

    pairs = setup.data.training
    columns: dict[str, Callable[[Any], Any]] = {
        "ids": lambda pair: list(pair.prompt_ids),
        "chosen_ids": lambda pair: list(pair.chosen_ids),
        "rejected_ids": lambda pair: list(pair.rejected_ids),
    }
    longest = max(pair.width for pair in pairs)
    return OnTokens(
        model=load_model(setup.config, setup.tokenizer),
        args=CPOConfig(
            **setup.options,
            beta=setup.config.resolved_beta,
            loss_type="sigmoid",
            cpo_alpha=0.0,
            max_length=longest,
        ),
        train_dataset=Dataset.from_dict({name: [get(pair) for pair in pairs] for name, get in columns.items()}),
        processing_class=setup.tokenizer,
    )


_MAKERS: Mapping[str, Callable[[Setup], Trainer]] = {
    TRAIN_PACKED: _ours,
    TRAIN_PADDED: _padded,
    TRAIN_CPO: _cpo,
    TRAIN_REFERENCE: _ours,
    TRAIN_DPO: _dpo,
}
