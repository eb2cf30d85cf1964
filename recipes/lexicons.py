"""Judges of other people's making, for recipes: pip install vaderSentiment textstat "setuptools<81".

They are imported at once, so that a comparison says before it begins that they are not there.
"""

from __future__ import annotations

import textstat
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_VADER = SentimentIntensityAnalyzer()


def sentiment(_: str, response: str) -> float:
    """The compound sentiment of VADER's lexicon, -1 to 1."""
    return float(_VADER.polarity_scores(response)["compound"])


def ease(_: str, response: str) -> float:
    """The Flesch reading ease, about 0 (hard) to 100 (easy)."""
    return float(textstat.flesch_reading_ease(response))
