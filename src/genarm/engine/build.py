"""From a loaded model to the trunks that run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from genarm.engine.attention import Plug
from genarm.engine.device import cost, draft_cost, settle
from genarm.engine.members import Members
from genarm.engine.options import MOST_WISHES
from genarm.engine.output_adapters import is_of_the_output
from genarm.engine.proof import expect, prove
from genarm.engine.request import wish_name
from genarm.engine.request_state import BASE_MEMBER
from genarm.engine.trunk import Trunk, TrunkMember, cannot_run, probe
from genarm.errors import ConfigError, UnsupportedError
from genarm.model.config import BASE
from genarm.model.generation import forward_arguments
from genarm.model.loading import Member
from genarm.model.modeling import GuidedForCausalLM
from genarm.model.references import positions_together

if TYPE_CHECKING:
    from genarm.model.vocabulary import Alignment

DRAFT = "draft model"  # for notes; no reward can have this name, and nothing is looked up by it


@dataclass(frozen=True, kw_only=True)
class Built:
    """The members and their trunks, with what the engine needs to know of them.

    Attributes:
        guess_costs: {member: cost of one forward, in forwards of the base} of members that could draft: those with
            a trunk of their own.
        draft_overhead: of drafting one token besides, likewise.
        notes: how each trunk runs, in words.
        context: positions of each request.
    """

    members: Members
    guess_costs: dict[int, float]
    draft_overhead: float
    notes: Sequence[str]
    context: int


@dataclass
class _Group:
    """One model's trunk in the making: several members may be one and the same there, reading other prompts."""

    model: PreTrainedModel
    members: list[TrunkMember]
    alignment: Alignment | None
    names: list[str]
    of_the_output: list[TrunkMember] = field(default_factory=list)

    def place(self, member: Member) -> int:
        """Which of the trunk's own members it is."""
        adapters = [own.adapter for own in self.members]
        if member.adapter not in adapters:
            self.members.append(TrunkMember(name=member.name, adapter=member.adapter))
            return len(adapters)
        return adapters.index(member.adapter)


def build(
    model: PreTrainedModel,
    *,
    draft: PreTrainedModel | None,
    draft_alignment: Alignment | None,
    streams: int,
    context: int | None,
    wishes: int = MOST_WISHES,
) -> Built:
    """Trunks for `model`, one per distinct model object among its members.

    Args:
        model: guided, or an ordinary causal LM, which is a base without rewards.
        draft: a small model to draft from.
        draft_alignment: of its vocabulary with the base's.
        streams: requests that may run at once.
        context: positions of each; by default what the members have, but no more than 2,048.
        wishes: how many of its own a request may have.

    Raises:
        ConfigError: a context beyond what a member has.
        UnsupportedError: a member that the engine cannot run, or memory that does not suffice.
    """
    members, alignments, unknown = _members(model)
    own = _own_wishes(model)
    if draft is not None:
        members.append(Member(name=DRAFT, model=draft))
        alignments.append(draft_alignment)
        unknown.append(None if draft_alignment is None else draft_alignment.mask())
    found = [positions_together(member.model.config) for member in members]
    most = min((n for n in found if n is not None), default=None)
    capacity = _capacity(context, most)
    groups: list[_Group] = []
    places: list[tuple[int, int]] = []
    of_the_output: dict[int, int] = {}
    for member, alignment in zip(members, alignments, strict=True):
        index = next((i for i, group in enumerate(groups) if group.model is member.model), None)
        if index is None:
            index = len(groups)
            groups.append(_Group(model=member.model, members=[], alignment=alignment, names=[]))
        plain = index == 0 and member.wish is None and members[BASE_MEMBER].adapter is None
        if plain and member.adapter and is_of_the_output(member.model, member.adapter):
            of_the_output[len(places)] = len(groups[0].of_the_output)
            groups[0].of_the_output.append(TrunkMember(name=member.name, adapter=member.adapter))
            places.append(places[BASE_MEMBER])
            continue
        places.append((index, groups[index].place(member)))
        if len(places) - 1 not in own:
            groups[index].names.append(member.name)
    trunks, notes = [], []
    for group in groups:
        # Requests with wishes of their own take more rows, so that fewer run at once; a lone one finds all that it may
        # need.
        most_rows = len(group.names) + (wishes if group is groups[0] else 0)
        trunk, note = _trunk(group, streams, max(streams * len(group.names), most_rows), capacity)
        trunks.append(trunk)
        notes.append(note)
    costs = [cost(group.model) for group in groups]
    guess_costs = {member: costs[index] / costs[0] for member, (index, _) in enumerate(places) if index}
    device = trunks[0].device
    placed = Members(
        trunks=trunks,
        places=places,
        reward_names=(*_reward_names(model), *(members[i].name for i in own)),
        references=_references(model),
        unknown=[None if mask is None else mask.to(device) for mask in unknown],
        wishes={i: m.wish for i, m in enumerate(members) if m.wish is not None},
        own_wishes=own,
        of_the_output=of_the_output,
    )
    return Built(
        members=placed,
        guess_costs=guess_costs,
        draft_overhead=draft_cost(groups[0].model) / costs[0],
        notes=notes,
        context=capacity,
    )


def foresee(model: PreTrainedModel) -> bool:
    """Whether a model without its weights, on the meta device, shows that the engine can run it.

    Returns:
        False where its forward needs values, so that it is not known before the model is loaded. Even where it does
        not, each trunk is compared with its model's own forward when it is built.

    Raises:
        UnsupportedError: what `build` refuses, as far as it shows without values.
    """
    models = {id(member.model): member.model for member in _members(model)[0]}
    for own in models.values():
        try:
            probe(own, Plug(own), forward_arguments(own), own.device)
        except UnsupportedError:
            raise
        except (NotImplementedError, RuntimeError):
            return False
        except Exception as error:
            raise _refused(own, error) from error
    return True


def _members(model: PreTrainedModel) -> tuple[list[Member], list[Alignment | None], list[Tensor | None]]:
    """The model's members, and after its rewards those that stand for the wishes of a request's own."""
    if isinstance(model, GuidedForCausalLM):
        members, alignments = list(model.members), [None, *model.alignments]
    else:
        members, alignments = [Member(name=BASE, model=model)], [None]
    masks = [None if alignment is None else alignment.mask() for alignment in alignments[1:]]
    at = len(_reward_names(model)) + 1
    members[at:at] = [Member(name=wish_name(i), model=members[0].model) for i in range(MOST_WISHES)]
    alignments[at:at] = [None] * MOST_WISHES
    masks[at - 1 : at - 1] = [None] * MOST_WISHES
    return members, alignments, masks


def _reward_names(model: PreTrainedModel) -> tuple[str, ...]:
    return model.reward_names if isinstance(model, GuidedForCausalLM) else ()


def _own_wishes(model: PreTrainedModel) -> range:
    first = len(_reward_names(model)) + 1
    return range(first, first + MOST_WISHES)


def _references(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Of each reward, the model's and a request's own wishes, which are compared with the base."""
    own = _own_wishes(model)
    given = model.references if isinstance(model, GuidedForCausalLM) else ()
    moved = [i if i is None or i < own.start else i + len(own) for i in given]
    return (*moved, *[BASE_MEMBER for _ in own])


def _trunk(group: _Group, streams: int, rows: int, capacity: int) -> tuple[Trunk, str]:
    names = ", ".join(group.names)
    try:
        path = settle(group.model)
        expected = expect(group.model, group.members, rows=min(2, streams), capacity=capacity)
        trunk = Trunk(
            group.model,
            group.members,
            group.alignment,
            rows=rows,
            capacity=capacity,
            graphs=path.graphs,
            of_the_output=[member.adapter for member in group.of_the_output if member.adapter],
        )
        prove(trunk, expected)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever a model's own code raises where it is not run as it expects
        if _out_of_memory(error):
            raise UnsupportedError(
                f"there is no memory for the keys and values of {streams} streams of {capacity} tokens for {names}; "
                "ask for fewer streams or a shorter context"
            ) from error
        raise _refused(group.model, error) from error
    heads = ", ".join(member.name for member in group.of_the_output)
    told = f"; {heads}: told from its hidden states" if heads else ""
    together = "" if len(group.names) == 1 else ", together in one forward" if trunk.shared else ", one after the other"
    replayed = ", decode steps replayed as CUDA graphs" if trunk.replays else ""
    memory = f"{_size(trunk.kv_cache.bytes)} for the tokens in hand (KV cache)"
    return trunk, f"{names}: {path.why}{together}{replayed}{told}; {memory}"


def _refused(model: PreTrainedModel, error: Exception) -> UnsupportedError:
    return cannot_run(model, f"{type(error).__name__}: {error}")


def _out_of_memory(error: Exception) -> bool:
    """Of the device, or of a CPU, whose allocator has no error of its own; other errors speak of memory too."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "you tried to allocate" in str(error)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _capacity(context: int | None, most: int | None) -> int:
    if context is None:
        return min(most or _USUAL_CONTEXT, _USUAL_CONTEXT)
    if context < 2 or (most is not None and context > most):
        allowed = "at least 2" if most is None else f"from 2 to {most}, which every member has"
        raise ConfigError(f"the context is {context} tokens; it must be {allowed}")
    return context


_USUAL_CONTEXT = 2048
