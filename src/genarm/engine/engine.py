"""The engine's face: requests in, streams of tokens out.

Three layers: `Stepper.step` does one step for all requests, `Engine.stream` follows one of them, `Engine.generate`
collects many. Whoever waits for a token makes the steps, for all requests; once a second thread waits, or an asyncio
task, a thread of the engine's own makes them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import torch

from genarm.engine.build import build
from genarm.engine.members import Members
from genarm.engine.options import EngineOptions
from genarm.engine.reply_text import TextStream
from genarm.engine.request import Asked, Completion, Request, to_requests
from genarm.engine.request_state import BASE_MEMBER, RequestState
from genarm.engine.speculation import DraftLength, exponents
from genarm.engine.step import Stepper
from genarm.engine.stream import Bell, Event, Stream
from genarm.errors import ConfigError, DataError, EngineFailure
from genarm.model.assembly import output_rows
from genarm.model.combine import coefficients
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.vocabulary import align, read_vocabulary
from genarm.model.weights import weight_row
from genarm.model.wishes import encode_wishes
from genarm.sampling import Sampling, check_seed, stop_ids
from genarm.text.prompts import check_prompt_ids, encode_prompt

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from genarm.model.vocabulary import Alignment


class Engine:
    """A model that decodes many requests at once.

    The engine takes the model over: its adapters are stacked in place and, on a CPU, half precision may be converted.
    The model still works as before, but not at the same time as the engine.

    Attributes:
        after_step: called after each step by the thread that made it, if it is set.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        options: EngineOptions | None = None,
        *,
        draft: PreTrainedModel | None = None,
        draft_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """An engine for a loaded model.

        Args:
            model: guided, or any causal LM whose attention goes through transformers' interface.
            tokenizer: the base's.
            options: what is fixed from now on.
            draft: a small causal LM that drafts in the base's stead.
            draft_tokenizer: its tokenizer; where not given, its ids must be the base's.

        Raises:
            ConfigError: a context beyond what a member has.
            VocabularyError: the draft model has another vocabulary.
            UnsupportedError: a member that the engine cannot run, or memory that does not suffice.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.options = options or EngineOptions()
        alignment = None
        if draft is not None:
            base = model.base if isinstance(model, GuidedForCausalLM) else model
            alignment = _align_draft(base, tokenizer, draft, draft_tokenizer or tokenizer)
        built = build(
            model,
            draft=draft,
            draft_alignment=alignment,
            streams=self.options.streams,
            context=self.options.context,
            wishes=self.options.wishes,
        )
        self.context = built.context
        self.members = len(built.members.places) - len(built.members.own_wishes)
        self.default_weights = model.default_weights if isinstance(model, GuidedForCausalLM) else {}
        self._built = built
        costs = {m: c for m, c in built.guess_costs.items() if _can_draft(m, built.members)}
        self._guess_costs = _guessers(costs, self.options)
        self._vocabulary_size = output_rows(model.base if isinstance(model, GuidedForCausalLM) else model)
        self._stops = frozenset(i for i in stop_ids(model, tokenizer) if i < self._vocabulary_size)
        self._stepper = Stepper(built.members, streams=self.streams, chunk=self.options.chunk)
        self._scheduler = self._stepper.scheduler
        self._arrivals: list[RequestState] = []
        self._guard = threading.Lock()  # arrivals, the thread, whether it is closed
        self._stepping = threading.Lock()  # held by whoever makes a step
        self._wake = threading.Event()
        self._bell = Bell()
        self.after_step: Callable[[], None] | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @classmethod
    def from_pretrained(
        cls,
        reference: str | os.PathLike[str],
        options: EngineOptions | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
        draft: str | None = None,
        trust_remote_code: bool = False,
    ) -> Engine:
        """An engine for a guided folder, or for any other causal LM.

        Args:
            reference: the folder, or a hub id (ID@REVISION).
            options: what is fixed from now on.
            dtype: "auto" (the checkpoints' own), "float32", "bfloat16" or "float16".
            device: "cpu", "cuda", …, "auto" to spread models over all GPUs; None for the first GPU, if any.
            draft: folder or hub id of a small model that drafts in the base's stead.
            trust_remote_code: allow models with code of their own.

        Raises:
            MemberError, ConfigError, VocabularyError, UnsupportedError.
        """
        from genarm.model.references import open_files

        files = open_files(str(reference), trust_remote_code=trust_remote_code)
        small = None if draft is None else open_files(draft, trust_remote_code=trust_remote_code)
        return cls(
            files.load(dtype=dtype, device=device),
            files.tokenizer,
            options,
            draft=None if small is None else small.load(dtype=dtype, device=device),
            draft_tokenizer=None if small is None else small.tokenizer,
        )

    @classmethod
    def in_own_thread(cls, make: Callable[[], Engine]) -> Engine:
        """The engine that `make` returns; a new thread calls it and then makes all of the engine's steps.

        Whatever computes in another thread has a team of workers (OpenMP) of its own, which lives on and makes every
        step slower on a CPU; so a program that waits for its engine in other threads loads the model here as well.

        Raises:
            Whatever `make` raises.
        """
        made: Future[Engine] = Future()
        threading.Thread(target=_make_and_work, args=(make, made), name="genarm-engine", daemon=True).start()
        return made.result()

    @property
    def streams(self) -> int:
        """How many requests run at once."""
        return self.options.streams

    def describe(self) -> str:
        """What was chosen at the start: devices, dtypes, memory, who drafts."""
        members = self._built.members
        names = {**dict(enumerate(members.reward_names, start=1)), members.combined + 1: "draft model"}
        guessers = [names[member] for member in self._guess_costs]
        drafts = f"drafts from {', '.join(guessers)}" if guessers else "no drafts"
        head = f"{self.options.streams} streams of {self.context} tokens; {drafts}"
        return "\n".join([head, *self._built.notes])

    # --- asking -------------------------------------------------------------------------------------------------

    def begin(self, request: Request, deliver: Callable[[Event], None]) -> Callable[[], None]:
        """Begin a request whose tokens and whose end go to `deliver`, in the thread that makes the steps.

        Returns:
            What cancels it, from any thread.

        Raises:
            What `stream` raises.
        """
        state, _ = self._prepare(request)
        state.deliver = deliver
        self._submit([state])
        self.start()
        return lambda: self._cancel(state)

    def stream(self, request: Request) -> Stream:
        """Begin a request; its tokens come from the stream as they are drawn.

        Raises:
            DataError: the prompt is empty or leaves no room for the reply.
            WeightsError: an unknown reward, or a weight that is not finite.
            ConfigError: a logit bias or a stop id that the model never says, a negative seed, or a template argument
                that the chat template does not have.
            EngineFailure: the engine is closed.
        """
        state, stream = self._prepare(request)
        self._submit([state])
        return stream

    @overload
    def generate(
        self,
        asked: str | Request,
        *,
        sampling: Sampling | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Completion: ...

    @overload
    def generate(
        self,
        asked: Sequence[Request] | list[str],
        *,
        sampling: Sampling | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        asked: Asked | Sequence[Asked],
        *,
        sampling: Sampling | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Any: ...

    def generate(
        self,
        asked: Asked | Sequence[Asked],
        *,
        sampling: Sampling | None = None,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Completion | list[Completion]:
        """The reply to one prompt, or all replies to a list of them, in order.

        Args:
            asked: a prompt (text as it is, a conversation for the chat template, or token ids) or a `Request`, which
                has settings of its own; or a list of them.
            sampling: how tokens are drawn.
            weights: {reward: w} over the model's defaults.
            seed: of the first prompt's reply; each further prompt has the next number.
            stop: texts that end a reply, which then ends before them.

        Raises:
            ConfigError: what is asked has none of these forms, or there are settings beside a `Request`.
            GenarmError: as `stream` raises, before anything runs.
        """
        requests, alone = to_requests(asked, sampling, weights, seed, stop)
        replies = self._generate(requests)
        return replies[0] if alone else replies

    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        prepared = [self._prepare(request) for request in requests]
        self._submit([state for state, _ in prepared])
        streams = [stream for _, stream in prepared]
        try:
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    def _factors(self, weights: Sequence[float]) -> dict[int, float]:
        """What each member that runs is multiplied by, the base first; references whose parts cancel do not run."""
        members = self._built.members
        given = coefficients(torch.tensor([weights]), members.references, members.combined)
        streams = enumerate(given.streams_BS[0].tolist(), start=1)
        base = 1.0 if given.base_B is None else float(given.base_B[0])
        return {BASE_MEMBER: base, **{member: factor for member, factor in streams if factor}}

    def _prepare(self, request: Request) -> tuple[RequestState, Stream]:
        check_seed(request.seed)
        ids = self._encode(request)
        members = self._built.members
        if len(request.wishes) > self.options.wishes:
            raise ConfigError(
                f"the request has {len(request.wishes)} wishes and this engine takes up to {self.options.wishes}; make "
                "it with EngineOptions(wishes=…)"
            )
        own = [float(wish.weight) for wish in request.wishes]
        weights = [*weight_row(request.weights, self.default_weights), *own]
        weights += [0.0] * (len(members.reward_names) - len(weights))
        request.check_ids(self._vocabulary_size)
        rewards = {i + 1: w for i, w in enumerate(weights) if w != 0}
        contexts = self._contexts(request, rewards)
        factors = prompt_factors = self._factors(weights)
        if contexts:
            prompt_factors = self._factors([0.0 if i + 1 in contexts else w for i, w in enumerate(weights)])
        guessers: dict[int, float] = {}
        drafts = next((m for m in self._guess_costs if members.is_draft_model(m)), None)
        arms = {m: w for m, w in rewards.items() if m in self._guess_costs and m in factors}
        if arms or drafts is not None:
            guessers = exponents(arms, drafts)
        for_prompt = prompt_factors if request.prompt_log_probs is not None else ()
        others = [member for member in {**dict.fromkeys(for_prompt), **guessers} if member not in factors]
        state = RequestState(
            request=request,
            ids=ids,
            contexts=contexts,
            factors=factors,
            prompt_factors=prompt_factors,
            rewards=frozenset(rewards),
            members=[*factors, *others],
            guessers=guessers,
            stops=request.ends(self._stops),
            text=TextStream(self.tokenizer, request.stop, ids if request.continues else ()),
            length=DraftLength(
                most=self.options.speculate,
                cost=sum(self._guess_costs[member] for member in guessers),
                overhead=self._built.draft_overhead,
                adapt=self.options.adapt,
            ),
            limit=request.sampling.max_new_tokens,
        )
        stream = Stream(self, lambda: self._cancel(state), self._bell)
        state.deliver = stream.put
        return state, stream

    def _encode(self, request: Request) -> list[int]:
        prompt: Any = request.prompt
        if isinstance(prompt, str) or not all(isinstance(item, Integral) for item in prompt):
            ids = encode_prompt(self.tokenizer, prompt, request.reading)
        else:
            ids = [int(item) for item in prompt]
        check_prompt_ids(ids, self._built.members.embedding_size)
        if request.prompt_log_probs is not None and max(ids) >= self._vocabulary_size:
            raise DataError(f"the model never says the token id {max(ids)}, so a prompt with it has no log-probs")
        self._check_room(request, len(ids))
        return ids

    def _check_room(self, request: Request, length: int, wish: str = "") -> None:
        room = self.context - length
        wanted = request.sampling.max_new_tokens if request.reply else 0
        if room < wanted:
            raise DataError(
                f"{length} prompt tokens{wish} and up to {wanted} new ones are more than the "
                f"{self.context} positions of this engine; shorten the prompt, lower max_new_tokens"
                f"{f' to {room}' if room > 0 else ''}, or start it with a larger context"
            )

    def _contexts(self, request: Request, rewards: Container[int]) -> dict[int, list[int]]:
        """{member: the prompt as it reads it} of the wishes that have a weight."""
        members = self._built.members
        own = zip(members.own_wishes, request.wishes, strict=False)
        wishes = {**members.wishes, **{member: wish.text for member, wish in own}}
        texts = {members.reward_names[m - 1]: text for m, text in wishes.items() if m in rewards}
        prompt: Any = request.prompt
        if isinstance(prompt, str) or not all(isinstance(item, Integral) for item in prompt):
            given: Mapping[str, Sequence[int]] = encode_wishes(self.tokenizer, prompt, texts, request.reading)
        else:
            given = request.contexts
        contexts = {}
        for name in texts:
            if name not in given:
                raise DataError(
                    f"the prompt is token ids, in which the words of the wish {name!r} have no place; give text or "
                    "messages, the ids as the wish reads them in contexts, or the wish the weight 0"
                )
            ids = [int(item) for item in given[name]]
            check_prompt_ids(ids, members.embedding_size)
            self._check_room(request, len(ids), f" (with the wish {name!r})")
            contexts[members.reward_names.index(name) + 1] = ids
        return contexts

    # --- making steps -------------------------------------------------------------------------------------------

    def _submit(self, states: Sequence[RequestState]) -> None:
        with self._guard:
            if self._closed:
                raise EngineFailure("the engine is closed; make a new one")
            self._arrivals.extend(states)
        self._wake.set()

    def advance(self) -> bool:
        """Make one step in this thread; False where another one does, for which the caller then waits.

        A thread that computes has a team of workers of its own (OpenMP), and two teams on the same cores get in each
        other's way; so a lone caller computes itself, and several leave it to one thread.
        """
        if self._thread is not None:
            return False
        if not self._stepping.acquire(blocking=False):
            self.start()
            return False
        try:
            self._step()
        finally:
            self._stepping.release()
        return True

    def start(self) -> None:
        """Let a thread of the engine's own make the steps from now on; asyncio needs it and starts it."""
        with self._guard:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="genarm-engine", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while not self._closed:
            self._wake.clear()
            with self._stepping:
                self._step()
            if not (self._arrivals or self._scheduler.busy):
                self._wake.wait()

    def _step(self) -> None:
        with self._guard:
            arrived, self._arrivals = self._arrivals, []
        for state in arrived:
            self._scheduler.add(state)
        try:
            with self._bell.held():
                self._stepper.step()
        except BaseException as error:  # Ctrl-C too may leave a step half done
            failure = EngineFailure(f"a step failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._scheduler.fail(failure)
            if not isinstance(error, Exception):
                raise
        finally:
            if self.after_step is not None:
                self.after_step()

    def _cancel(self, state: RequestState) -> None:
        """End a request: free its rows now, or as soon as the step that is being made is done."""
        if state.cancelled:
            return
        state.cancelled = True
        self._wake.set()
        if self._thread is None and self._stepping.acquire(blocking=False):
            try:
                self._scheduler.end_cancelled()
            finally:
                self._stepping.release()

    def close(self) -> None:
        """Stop; what still runs ends with an EngineFailure."""
        with self._guard:
            self._closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._stepping:
            for state in self._arrivals:
                self._scheduler.add(state)
            self._arrivals = []
            self._scheduler.fail(EngineFailure("the engine was closed"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- looking ------------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Counters, for a look from outside; a moment old at most."""
        members = self._built.members
        return Statistics(
            waiting=len(self._scheduler.waiting) + len(self._arrivals),
            running=len(self._scheduler.running),
            free_rows=tuple(trunk.kv_cache.free for trunk in members.trunks),
            steps=self._stepper.steps,
            passes=tuple(trunk.passes for trunk in members.trunks),
            cache_bytes=sum(trunk.kv_cache.bytes for trunk in members.trunks),
        )


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What an engine has done and does.

    Attributes:
        waiting, running: requests.
        free_rows: of each trunk's KV cache; the base's trunk first.
        steps: made so far.
        passes: forwards of each trunk so far.
        cache_bytes: memory of all keys and values.
    """

    waiting: int
    running: int
    free_rows: Sequence[int]
    steps: int
    passes: Sequence[int]
    cache_bytes: int


_WORTH_DRAFTING = 0.5
"""A member that costs more than this share of the base cannot save time by drafting for it."""


def _make_and_work(make: Callable[[], Engine], made: Future[Engine]) -> None:
    try:
        engine = make()
        engine._thread = threading.current_thread()
    except BaseException as error:
        made.set_exception(error)
        return
    made.set_result(engine)
    engine._work()


def _can_draft(member: int, members: Members) -> bool:
    """Whether it is a draft model or an ARM; a difference, and what it is compared with, is no guess of the whole."""
    if member > members.combined:
        return True
    return member <= len(members.reward_names) and members.references[member - 1] is None


def _guessers(costs: Mapping[int, float], options: EngineOptions) -> dict[int, float]:
    """The members that draft, with their costs."""
    if not options.speculate:
        return {}
    return {m: cost for m, cost in costs.items() if cost <= _WORTH_DRAFTING or not options.adapt}


def _align_draft(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    draft: PreTrainedModel,
    draft_tokenizer: PreTrainedTokenizerBase,
) -> Alignment:
    return align(
        read_vocabulary(tokenizer, size=output_rows(base), label="the base"),
        read_vocabulary(draft_tokenizer, size=output_rows(draft), label="the draft model"),
    )
