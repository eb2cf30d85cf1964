"""How a request is guided: the weights of the rewards, wishes of its own, and the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genarm.engine.request import wish_name
from genarm.errors import WeightsError
from genarm.model.wishes import Wish
from genarm.server.errors import ApiError
from genarm.server.job import Service
from genarm.server.schema import ChatRequest, CompletionRequest


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """What leads the replies to one request away from the base.

    Attributes:
        weights: of all of the model's rewards.
        wishes: the request's own.
        max_kl: the most nats from the base for each token, or None.
        heard: {name: text} of the wishes that count, the model's and the request's own; they read prompts of their own.
    """

    weights: Mapping[str, float]
    wishes: Sequence[Wish]
    max_kl: float | None
    heard: Mapping[str, str]

    @property
    def all_weights(self) -> dict[str, float]:
        """Of rewards and of the request's own wishes, by the names that tokens have them by."""
        return {**self.weights, **{wish_name(i): wish.weight for i, wish in enumerate(self.wishes)}}


def guidance_of(service: Service, asked: ChatRequest | CompletionRequest) -> Guidance:
    """What a request asks, over what its model's name says, over the model's defaults.

    Raises:
        ApiError: no such model or preset, or wishes that this server does not take.
        WeightsError: an unknown reward, a weight that is not finite or out of range.
    """
    names = service.names
    weights = names.resolve(asked.model, asked.reward_weights)
    wishes = [Wish(text=wish.text, weight=wish.weight) for wish in asked.wishes or ()]
    if wishes and (why := no_wishes(service)):
        raise ApiError(400, f"wishes is not available: {why}", param="wishes", code="unsupported_parameter")
    own = {wish_name(i): wish for i, wish in enumerate(wishes)}
    try:
        names.check_range({name: wish.weight for name, wish in own.items()}, "give a smaller one")
    except WeightsError as error:
        raise ApiError(400, str(error), param="wishes", code="invalid_weights") from None
    heard = {name: text for name, text in names.wishes.items() if weights[name] != 0}
    heard |= {name: wish.text for name, wish in own.items() if wish.weight != 0}
    max_kl = names.budget(asked.model) if asked.max_kl is None else asked.max_kl
    return Guidance(weights=weights, wishes=wishes, max_kl=max_kl, heard=heard)


def no_wishes(service: Service) -> str:
    """Why requests cannot have wishes of their own, and what to do; nothing where they can."""
    if not service.backend.wishes:
        return (
            "this server decodes with vLLM, which reads one prompt for all members. Leave wishes out, or start the "
            "server with --engine genarm."
        )
    if not service.request_wishes:
        return "this server was started with --no-request-wishes. Leave wishes out."
    return ""


def check_readable(guidance: Guidance, prompts: Sequence[str | list[int]]) -> None:
    """Refuse token ids where a wish counts (raises ApiError): its words would stand before the text."""
    if not guidance.heard or not any(isinstance(prompt, list) for prompt in prompts):
        return
    name = next(iter(guidance.heard))
    zero = f'"reward_weights": {{"{name}": 0}}' if name in guidance.weights else "in wishes"
    raise ApiError(
        400,
        f"the prompt is token ids, in which the words of the wish {name!r} have no place; send the prompt as text, or "
        f"give the wish the weight 0 ({zero})",
        param="prompt",
        code="invalid_prompt",
    )
