"""From tokens to the log-probabilities and rewards that clients read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genarm.engine import Token
from genarm.server.replies import ChatLogprobs, RewardShare, TextLogprobs, TokenLogprob, TokenShares, TopLogprob
from genarm.server.texts import Texts
from genarm.text.detokenizer import TokenText

_LOWEST = -9999.0
"""In the place of minus infinity, which JSON does not have; OpenAI's number."""


class Labels:
    """Labels the tokens of one reply, in order, over as many calls as it takes."""

    def __init__(self, texts: Texts, weights: Mapping[str, float], *, fresh: bool) -> None:
        """Begin.

        Args:
            texts: knows the tokens.
            weights: of the rewards.
            fresh: the reply begins a text of its own, with no space before its first word.
        """
        self._texts = texts
        self._weights = weights
        self._fresh = fresh

    def begun(self) -> None:
        """A first token has been labelled; spaces count from now on."""
        self._fresh = False

    def text(self, token_id: int) -> TokenText:
        """Of the next token, or of what might have come in its place."""
        return self._texts.token(token_id, first=self._fresh)

    def chat(self, token: Token) -> ChatLogprobs:
        """For one token of a chat."""
        tops = [self._top(token_id, log_prob) for token_id, log_prob in token.top]
        own = self._top(token.id, token.log_prob)
        return ChatLogprobs(content=[TokenLogprob(**own, top_logprobs=tops)])

    def _top(self, token_id: int, log_prob: float) -> TopLogprob:
        text = self.text(token_id)
        return TopLogprob(token=text.text, bytes=list(text.data), logprob=_finite(log_prob))

    def completion(self, token: Token, offset: int) -> TextLogprobs:
        """For one token of a completion, which begins at the character `offset`."""
        text = self.text(token.id).text
        top: dict[str, float] = {}
        for token_id, log_prob in (*token.top, (token.id, token.log_prob)):
            top.setdefault(self.text(token_id).text, _finite(log_prob))
        return TextLogprobs(
            tokens=[text], token_logprobs=[_finite(token.log_prob)], top_logprobs=[top], text_offset=[offset]
        )

    def first(self, token_id: int) -> TextLogprobs:
        """For the first token of a prompt, which nothing predicts."""
        return TextLogprobs(
            tokens=[self.text(token_id).text], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
        )

    def rewards(self, token: Token) -> TokenShares:
        """What everyone says of a token; rewards of weight 0 are not run and have nothing to say."""
        text = self.text(token.id)
        shares = {
            name: RewardShare(
                logprob=_finite(said), weight=self._weights[name], contribution=_finite(self._weights[name] * said)
            )
            for name, said in token.rewards.items()
        }
        return TokenShares(
            token=text.text,
            bytes=list(text.data),
            logprob=_finite(token.log_prob),
            base_logprob=None if token.base is None else _finite(token.base),
            rewards=shares,
        )

    def first_rewards(self, token_id: int) -> TokenShares:
        """For the first token of a prompt."""
        text = self.text(token_id)
        return TokenShares(token=text.text, bytes=list(text.data), logprob=None, base_logprob=None, rewards={})


def joined_chat(parts: Sequence[ChatLogprobs]) -> ChatLogprobs:
    """Of several tokens."""
    return ChatLogprobs(content=[token for part in parts for token in part["content"]])


def joined_text(parts: Sequence[TextLogprobs]) -> TextLogprobs:
    """Of several tokens."""
    return TextLogprobs(
        tokens=[token for part in parts for token in part["tokens"]],
        token_logprobs=[number for part in parts for number in part["token_logprobs"]],
        top_logprobs=[top for part in parts for top in part["top_logprobs"] or []],
        text_offset=[offset for part in parts for offset in part["text_offset"]],
    )


def _finite(number: float) -> float:
    return min(max(number, _LOWEST), -_LOWEST)
