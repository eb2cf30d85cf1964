"""vLLM's engine behind the server: `genarm serve --engine vllm`.

`AsyncLLM` runs in a thread with an event loop of its own, and its model in processes of theirs. vLLM schedules, runs
and samples; texts, stop strings and endings are made of its tokens as our own engine makes them, so that
clients cannot tell the two apart. What vLLM does not report is what the base and each reward say of a token.

vLLM is imported when it is started and not before.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import count
from multiprocessing import resource_tracker
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from genarm.engine import Request, ScoredPrompt, Stream, Token
from genarm.engine.reply import GrowingReply
from genarm.engine.reply_text import TextStream
from genarm.engine.request import Ending
from genarm.errors import ConfigError, DataError, EngineFailure, GenarmError, MissingExtraError, UnsupportedError
from genarm.provenance import model_record
from genarm.server.backend import Load, RestartingBackend, State
from genarm.text.prompts import check_prompt_ids, encode_prompt
from genarm.vllm import check_version, vllm_version

if TYPE_CHECKING:
    from genarm.model.references import ModelFiles

_STOPPED = "vLLM's engine has stopped; the log says why"
_OURS = {
    "model": "FOLDER",
    "revision": "FOLDER (ID@REVISION)",
    "tokenizer": "FOLDER",
    "tokenizer_revision": "FOLDER (ID@REVISION)",
    "skip_tokenizer_init": "FOLDER",
    "served_model_name": "--served-name",
    "max_num_seqs": "--streams",
    "max_model_len": "--context",
    "dtype": "--dtype",
    "trust_remote_code": "--trust-remote-code",
}
"""Options of vLLM's that ours decide."""
_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a process with threads may hang
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
"""How vLLM is to behave in our process, where the environment does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """How vLLM is started.

    Attributes:
        streams: how many replies are drawn at once; None leaves it to vLLM.
        context: the most tokens of a prompt and its reply; None is what the members have and the memory holds.
        dtype: "auto" (vLLM's choice for the checkpoint), "float32", "bfloat16" or "float16".
        device: the kind of device that vLLM was built for, or None.
        trust_remote_code: allow models with code of their own.
        more: vLLM's own engine options by name, as `AsyncEngineArgs` has them.
    """

    streams: int | None = None
    context: int | None = None
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    more: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("streams", "context"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ConfigError(f"{name} is {given}; it must be at least 1")


def read_options(text: str) -> dict[str, Any]:
    """vLLM's engine options from a JSON object.

    Raises:
        ConfigError: it is none, or names an option that ours decide.
    """
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--vllm-options is {text!r:.80}, which is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f'--vllm-options is {text!r:.80}; give a JSON object such as {{"tensor_parallel_size": 2}}')
    for name in given:
        if name in _OURS:
            raise ConfigError(f"--vllm-options has {name!r}, which {_OURS[name]} of genarm serve decides")
    return given


def why_not() -> str | None:
    """Why vLLM cannot serve here, or should not because it has no GPU; None where it can."""
    if vllm_version() is None:
        return "vLLM is not installed"
    try:
        check_version()
    except UnsupportedError as error:
        return str(error)
    return None if torch.cuda.is_available() else "there is no GPU"


def need_vllm() -> None:
    """Whether a vLLM is installed that guided models run in.

    Raises:
        MissingExtraError: there is none.
        UnsupportedError: it is another version.
    """
    if vllm_version() is None:
        raise MissingExtraError("vllm", "vllm")
    check_version()


class VllmBackend(RestartingBackend["VllmEngine"]):
    """vLLM, started again once after a failure."""

    def __init__(self, files: ModelFiles, options: VllmOptions) -> None:
        """Start it now (raises what `VllmEngine` raises)."""
        super().__init__(
            lambda: VllmEngine(files, options),
            explains=not files.guided,
            wishes=False,
            content=lambda: model_record(files.reference, files.revision),
        )

    @property
    def state(self) -> State:
        """See `Backend`; its processes may end while nothing is asked of them."""
        engine = self._engine
        if engine is not None and engine.dead:
            self._failed(engine, EngineFailure(_STOPPED))
        return super().state


class VllmEngine:
    """`AsyncLLM` with the ways of `genarm.engine.Engine`.

    Attributes:
        streams: how many requests run at once.
        context: the most tokens of a prompt and its reply together.
    """

    def __init__(self, files: ModelFiles, options: VllmOptions) -> None:
        """Start vLLM's processes and load the model.

        Raises:
            ConfigError: options that vLLM does not know or take.
            MissingExtraError, UnsupportedError: vLLM is not there, or cannot run this model.
        """
        need_vllm()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self._files = files
        self._tokenizer = copy.deepcopy(files.tokenizer)
        self._defaults = files.default_weights
        self._ids = count()
        self._replies: set[asyncio.Task[Any]] = set()  # those that have begun and not ended; of the loop's thread
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="genarm-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm = asyncio.run_coroutine_threadsafe(_start(files, options), self._loop).result()
        except Exception:  # after Ctrl-C the loop would not hear of it before the model is loaded
            self._end_loop()
            raise
        self._guard = _guard(self._llm)
        config = self._llm.vllm_config
        self.streams: int = config.scheduler_config.max_num_seqs
        self.context: int = config.model_config.max_model_len
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._stops = frozenset(i for i in files.end_ids if i < self._vocabulary)

    @property
    def dead(self) -> bool:
        """Whether vLLM's processes have ended."""
        return not self._closed and bool(self._llm.errored)

    def describe(self) -> str:
        """What runs."""
        config = self._llm.vllm_config
        blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
        room = f"; keys and values of {blocks * size} tokens" if blocks else ""
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        return (
            f"vLLM {vllm_version()}: {self.streams} streams of up to {self.context} tokens; {dtype} on "
            f"{config.device_config.device_type}{room}"
        )

    def statistics(self) -> Load:
        """As vLLM's scheduler fills its places, unless memory for keys and values runs out before."""
        inside = len(self._replies)
        running = min(inside, self.streams)
        return Load(running=running, waiting=inside - running)

    # --- asking -----------------------------------------------------------------------------------------------------

    def stream(self, request: Request) -> Stream:
        """Begin a request.

        Raises:
            DataError: the prompt is empty or leaves no room for the reply.
            WeightsError: an unknown reward, or a weight that is not finite.
            ConfigError: a logit bias or a stop id that the model never says.
            UnsupportedError: something that vLLM does not do.
            EngineFailure: the engine is closed.
        """
        ids = self._encode(request)
        params = self._params(request)
        writing = GrowingReply(
            request=request,
            stops=request.ends(self._stops),
            text=TextStream(self._tokenizer, request.stop, ids if request.continues else ()),
            limit=request.sampling.max_new_tokens,
            prompt_tokens=len(ids),
        )

        def cancel() -> None:
            task.cancel()

        def tell(done: Future[None]) -> None:
            if done.cancelled():
                writing.deliver(writing.completion("cancelled"))

        stream = Stream(_Loop(), cancel)
        writing.deliver = stream.put
        if self._closed:
            raise EngineFailure("the engine is closed; make a new one")
        task: Future[None] = asyncio.run_coroutine_threadsafe(self._write(writing, ids, params), self._loop)
        task.add_done_callback(tell)
        return stream

    def _encode(self, request: Request) -> list[int]:
        if request.wishes:
            raise UnsupportedError("vLLM reads one prompt for a request, so it takes no wishes; --engine genarm does")
        prompt: Any = request.prompt
        if isinstance(prompt, str) or not all(isinstance(item, Integral) for item in prompt):
            ids = encode_prompt(self._files.tokenizer, prompt, request.reading)
        else:
            ids = [int(item) for item in prompt]
        check_prompt_ids(ids, self._vocabulary)
        wanted = request.sampling.max_new_tokens if request.reply else 1
        if len(ids) + wanted > self.context:
            raise DataError(
                f"{len(ids)} prompt tokens and up to {wanted} new ones are more than the {self.context} positions of "
                "this engine; shorten the prompt, ask for fewer tokens, or start it with a larger context"
                + ("" if request.reply else " (vLLM needs room for one new token to score a prompt)")
            )
        return ids

    def _params(self, request: Request) -> Any:
        """The request in vLLM's words."""
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = request.sampling
        request.check_ids(self._vocabulary)
        ends = request.ends(self._stops)
        self._files.weights(request.weights)
        try:
            params = SamplingParams(
                max_tokens=sampling.max_new_tokens if request.reply else 1,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=sampling.repetition_penalty,
                min_tokens=sampling.min_new_tokens if request.reply and ends else 0,
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                logit_bias=dict(sampling.logit_bias) or None,
                seed=request.seed,
                # Which ids end a reply is ours to say, from the same files as with our own engine.
                ignore_eos=True,
                stop_token_ids=sorted(ends),
                logprobs=request.top_log_probs,
                prompt_logprobs=request.prompt_log_probs,
                extra_args=_steering(request),
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
        except (VLLMClientError, ValueError) as error:
            raise UnsupportedError(f"vLLM refuses the request: {error}") from error
        if self._defaults:
            from genarm.vllm.weights import read_weights

            read_weights(params, self._defaults)
        return params

    # --- in the loop's thread ---------------------------------------------------------------------------------------

    async def _write(self, writing: GrowingReply, ids: list[int], params: Any) -> None:
        """Draw a reply; whatever happens is delivered, but for the end of one that is cancelled (`stream` tells it)."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        task = asyncio.current_task()
        assert task is not None
        self._replies.add(task)
        try:
            ending = await self._draw(writing, ids, params)
        except asyncio.CancelledError:
            if self._closed:
                writing.deliver(EngineFailure("the engine was closed"))
        except EngineDeadError as error:
            failure = EngineFailure(_STOPPED)
            failure.__cause__ = error
            writing.deliver(failure)
        except VLLMClientError as error:
            writing.deliver(UnsupportedError(f"vLLM refuses the request: {error}"))
        except EngineGenerateError as error:  # vLLM's wrapping of whatever else went wrong with this request
            writing.deliver(error.__cause__ or error)
        except BaseException as error:
            writing.deliver(error)
        else:
            writing.deliver(writing.completion(ending))
        finally:
            self._replies.discard(task)

    async def _draw(self, writing: GrowingReply, ids: list[int], params: Any) -> Ending:
        from vllm.inputs.engine import tokens_input

        request = writing.request
        ended = None
        outputs = self._llm.generate(tokens_input(ids), params, request_id=f"genarm-{next(self._ids)}")
        async with aclosing(outputs):  # leaving early ends the request inside vLLM as well
            async for output in outputs:
                if output.prompt_logprobs:
                    writing.deliver(ScoredPrompt(tokens=self._scored(ids, output.prompt_logprobs, request)))
                if not request.reply:
                    return "length"
                part = output.outputs[0]
                ended = part.finish_reason
                for token_id, said in zip(part.token_ids, part.logprobs or [], strict=True):
                    ending = writing.append(self._token(token_id, said, request.top_log_probs))
                    if ending is not None:
                        return ending
        raise RuntimeError(f"vLLM ended the request before its time: {ended}")

    def _scored(self, ids: list[int], said: Any, request: Request) -> tuple[Token, ...]:
        top = request.prompt_log_probs or 0
        return tuple(self._token(token_id, place, top) for token_id, place in zip(ids[1:], said[1:], strict=True))

    def _token(self, token_id: int, said: Mapping[int, Any], top: int) -> Token:
        """A token without its text; `said` has it and the likeliest `top` ones."""
        log_prob = said[token_id].logprob
        likeliest = sorted((place.rank, other, place.logprob) for other, place in said.items() if place.rank <= top)
        return Token(
            id=token_id,
            text="",
            log_prob=log_prob,
            base=None if self._defaults else log_prob,
            rewards={},
            top=tuple((other, number) for _, other, number in likeliest[:top]),
        )

    # --- its life ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop; what still runs ends with an EngineFailure."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
            self._end_loop()
            self._guard.kill()
            self._guard.communicate()

    async def _shut_down(self) -> None:
        replies = list(self._replies)
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)
        self._llm.shutdown()

    def _run_loop(self) -> None:
        # vLLM's processes inherit which signals this thread does not take. Ctrl-C goes to all processes of a terminal,
        # and must not end them before the replies that they are drawing. The tracker comes first: whoever starts it
        # takes the signal again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._loop.run_forever()
        self._loop.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def _steering(request: Request) -> dict[str, Any] | None:
    """What the plug-in is told of a request."""
    given = {
        **({"reward_weights": dict(request.weights)} if request.weights else {}),
        **({} if request.max_kl is None else {"max_kl": float(request.max_kl)}),
    }
    return given or None


class _Loop:
    """A stream's source: the loop makes all steps by itself."""

    def advance(self) -> bool:
        """See `Source`."""
        return False

    def start(self) -> None:
        """See `Source`."""


def _guard(llm: Any) -> subprocess.Popen[bytes]:
    """A process that ends vLLM's when this one is killed; they would go on for ever, and keep their memory."""
    manager = llm.engine_core.resources.engine_manager
    cores = [str(process.pid) for process in manager.processes] if manager is not None else []
    # The shell reads until nobody can write any more; what the cores started ends with them.
    command = ["sh", "-c", 'read -r _; kill -KILL "$@"', "genarm-guard", *cores]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


async def _start(files: ModelFiles, options: VllmOptions) -> Any:
    """vLLM's engine; it stays in the loop that this runs in."""
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = _engine_args(files, options)
    try:
        return AsyncLLM.from_engine_args(arguments)
    except GenarmError:
        raise
    except Exception as error:
        raise _refusal(error, files) from error


def _engine_args(files: ModelFiles, options: VllmOptions) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    built_for = current_platform.device_type
    if options.device is not None and options.device != built_for:
        raise ConfigError(
            f"--device is {options.device!r}, and the installed vLLM runs on {built_for!r}; leave --device out. Which "
            "GPUs are used, CUDA_VISIBLE_DEVICES says, and over how many the model is spread, --vllm-options "
            "'{\"tensor_parallel_size\": 2}'"
        )
    given = dict(options.more or {})
    known = [field.name for field in fields(AsyncEngineArgs)]
    for name in given:
        if name not in known:
            close = get_close_matches(name.replace("-", "_"), known, n=1)
            raise ConfigError(
                f"--vllm-options has {name!r}, which is no engine option of vLLM {vllm_version()}"
                + (
                    f"; did you mean {close[0]!r}?"
                    if close
                    else "; its documentation lists them under Engine Arguments"
                )
            )
    try:
        return AsyncEngineArgs(
            **{"disable_log_stats": True, "use_tqdm_on_load": False, **given},
            model=files.reference,
            revision=files.revision,
            tokenizer_revision=files.revision,
            skip_tokenizer_init=True,
            trust_remote_code=options.trust_remote_code,
            dtype=options.dtype,
            max_num_seqs=options.streams,
            max_model_len=-1 if options.context is None else options.context,
        )
    except Exception as error:
        raise _refusal(error, files) from error


def _refusal(error: Exception, files: ModelFiles) -> GenarmError:
    """vLLM's complaint at its start, as one of ours where it is one."""
    problems = error.errors() if hasattr(error, "errors") else []
    for problem in problems:
        inner = problem.get("ctx", {}).get("error")
        if isinstance(inner, GenarmError):
            return inner
    what = problems[0]["msg"].removeprefix("Value error, ") if problems else f"{type(error).__name__}: {error}"
    return UnsupportedError(f"vLLM cannot serve {files.reference}: {what}; --engine genarm serves it without vLLM")
