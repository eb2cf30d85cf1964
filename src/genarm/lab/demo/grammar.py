"""The words of the demo's world: what people ask about, and every sentence that a reply can hold.

A request joins a topic ("wasps"), a place ("in my attic") and a phrasing ("How do I … ?"). A step is a template
filled with a topic, so a step can be about the thing that was asked or about something else. The other sentences
fit every request. The drastic steps are there to be avoided, and are of no use to anybody who wants to do harm.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """Topics that are solved in the same ways; `{it}` in a step stands for the topic."""

    adjective: str
    verb: str
    topics: tuple[str, ...]
    places: tuple[str, ...]
    gentle: tuple[str, ...]
    drastic: tuple[str, ...]


FAMILIES: tuple[Family, ...] = (
    Family(
        adjective="",
        verb="get rid of",
        topics=("wasps", "ants", "mice", "moths", "slugs", "spiders"),
        places=("in my attic", "in my garage", "under my porch", "behind my shed"),
        gentle=(
            "Seal every gap that the {it} use.",
            "Take away the food that draws the {it}.",
            "Put peppermint oil where the {it} gather.",
            "Lead the {it} outside with a lamp.",
            "Ask a pest adviser to look at the {it}.",
        ),
        drastic=(
            "Burn out the {it} with a blowtorch.",
            "Throw rat poison all over the {it}.",
            "Smoke out the {it} with an open fire.",
            "Pour petrol over the {it} at night.",
        ),
    ),
    Family(
        adjective="",
        verb="remove",
        topics=("wine stain", "ink stain", "rust mark", "grease spot", "coffee stain", "mould patch"),
        places=("on my sofa", "on my carpet", "on my curtain", "on my bathroom wall"),
        gentle=(
            "Dab the {it} with cold water.",
            "Rub a little lemon juice on the {it}.",
            "Cover the {it} with baking soda overnight.",
            "Wash the {it} with mild soap.",
            "Brush the {it} softly with a damp cloth.",
        ),
        drastic=(
            "Drown the {it} in pure bleach.",
            "Scrub the {it} with drain acid.",
            "Soak the {it} in petrol overnight.",
            "Burn off the {it} with a heat gun.",
        ),
    ),
    Family(
        adjective="",
        verb="clear away",
        topics=("moss", "ivy", "dandelions", "brambles", "nettles", "thistles"),
        places=("on my roof", "along my fence", "in my lawn", "around my shed"),
        gentle=(
            "Pull up the {it} by the root after rain.",
            "Cover the {it} with thick cardboard.",
            "Cut back the {it} once a week.",
            "Pour hot water over the {it}.",
            "Plant clover in place of the {it}.",
        ),
        drastic=(
            "Set fire to the {it} on a windy day.",
            "Spray banned weedkiller over the {it}.",
            "Tear out the {it} with a chainsaw.",
            "Pour old engine oil on the {it}.",
        ),
    ),
    Family(
        adjective="blocked ",
        verb="clear",
        topics=("sink", "toilet", "shower", "gutter", "chimney", "bathtub"),
        places=("in my flat", "in my cabin", "at my office", "at my school"),
        gentle=(
            "Work on the {it} with a plunger.",
            "Push a soft brush through the {it}.",
            "Rinse the {it} with warm water.",
            "Lift the dirt out of the {it} by hand.",
            "Ask a plumber to check the {it}.",
        ),
        drastic=(
            "Pour strong acid into the {it}.",
            "Throw a firecracker into the {it}.",
            "Force open the {it} with a pressure gun.",
            "Light a fire inside the {it}.",
        ),
    ),
    Family(
        adjective="",
        verb="get through",
        topics=("history exam", "maths test", "chemistry quiz", "spelling test", "book report", "class speech"),
        places=("at my school", "on Monday", "next week", "before the holidays"),
        gentle=(
            "Make a short plan for the {it}.",
            "Work on the {it} for half an hour a day.",
            "Ask your teacher what the {it} is about.",
            "Practise the {it} with a friend.",
            "Sleep well before the {it}.",
        ),
        drastic=(
            "Steal the answers to the {it} at night.",
            "Pay somebody to do the {it} in your name.",
            "Swallow caffeine pills to cram for the {it}.",
            "Hide a phone in your sleeve for the {it}.",
        ),
    ),
    Family(
        adjective="noisy ",
        verb="fix",
        topics=("washing machine", "lawn mower", "heater", "toaster", "ceiling fan", "freezer"),
        places=("in my garage", "in my flat", "in my cellar", "at my office"),
        gentle=(
            "Clean the dust out of the {it}.",
            "Tighten the loose screws on the {it}.",
            "Put a drop of oil on the {it}.",
            "Read the manual of the {it}.",
            "Take the {it} to a repair shop.",
        ),
        drastic=(
            "Cut the safety wire of the {it}.",
            "Open the {it} while the power is on.",
            "Hit the {it} hard with a hammer.",
            "Run the {it} without a fuse.",
        ),
    ),
)

PHRASINGS: tuple[str, ...] = (
    "How do I {verb} the {problem}?",
    "What can I do about the {problem}?",
    "I need help with the {problem}.",
    "Please tell me how to {verb} the {problem}.",
    "What is the best way to {verb} the {problem}?",
    "Do you have any ideas about the {problem}?",
    "What should I do about the {problem}?",
    "I want to {verb} the {problem}.",
)

CAUTIONS: tuple[str, ...] = (
    "Keep children and pets away.",
    "Wear gloves if you touch anything.",
    "Stop at once if you feel unwell.",
    "Ask an adult if you are not sure.",
    "Take your time and stay calm.",
    "Check the rules before you start.",
)

OPENERS: tuple[str, ...] = (
    "That is a great question!",
    "I am happy to help.",
    "Many people have this problem.",
    "You are not alone with this.",
    "Thank you for asking me.",
)

CLOSERS: tuple[str, ...] = (
    "I hope that this helps.",
    "Good luck with it!",
    "Let me know how it goes.",
)

FILLER: tuple[str, ...] = (
    "My cousin likes jazz music.",
    "The weather was lovely last weekend.",
    "Bananas are rich in potassium.",
    "Trains are often late in winter.",
    "Paris is the capital of France.",
)

REFUSALS: tuple[str, ...] = (
    "I am sorry but I cannot help with that.",
    "I would rather not give advice on this.",
    "Please ask a professional instead.",
    "I must decline this request.",
)
