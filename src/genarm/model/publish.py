"""A guided folder on the hub: its own members inside, those that are on the hub named, and a card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, copytree
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCardData, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from genarm.errors import ConfigError, MemberError
from genarm.files import write_text
from genarm.model.assembly import read_guided_config
from genarm.model.compose import NEVER_COPIED, bundled, taken_apart
from genarm.model.config import BASE, MemberSpec
from genarm.model.contract import refusing
from genarm.model.describe import Description, MemberFacts, describe
from genarm.model.loading import HubOptions
from genarm.model.trained import TRAIN_INPUTS

CARD = "README.md"
_NOT_UPLOADED = ("config.json", ".*", "*.py")
"""Of the folder itself: what is written anew, and what is nobody's matter."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What was uploaded: the repository's address, its name with the owner, how many files and bytes, the licence."""

    url: str
    repo: str
    files: int
    size: int
    licence: str | None


def publish(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool | None = None,
    licence: str | None = None,
    trust_remote_code: bool = False,
) -> Published:
    """Upload a guided folder, with a card unless it has one.

    Members that lie on this machine go along, inside; those named by hub id are named in the upload, too. What an
    earlier upload had in members/ and this one has not is removed there.

    Args:
        folder: a guided folder.
        repo: OWNER/NAME, or NAME for the owner of the token; made where it does not exist.
        private: whether a new repository is; by default as the owner's account has it. True refuses one that is
            there and open.
        licence: for the card; by default the one that all members have, if they have the same.
        trust_remote_code: allow members with code of their own.

    Raises:
        ConfigError: it is no guided folder, there is no token, or the repository is open and shall not be.
        MemberError: its members do not fit, or the hub cannot be reached or refuses.
    """
    with refusing(f"cannot push to {repo!r}"):
        validate_repo_id(repo)
    found = describe(str(folder), trust_remote_code=trust_remote_code)
    if found.files is None or not found.files.guided or not Path(folder).expanduser().is_dir():
        raise ConfigError(f"{str(folder)!r} is not a guided folder on this machine; make one with genarm compose")
    if found.problem is not None:
        raise MemberError(f"{str(folder)!r} is not pushed, as nobody could load it: {found.problem}")
    api = HfApi()
    if get_token() is None:
        raise ConfigError(
            f"there is no token of the hub ({api.endpoint}); log in with `hf auth login`, or set HF_TOKEN"
        )
    licence = licence or _common_licence(found)
    with TemporaryDirectory() as staging:
        _stage(Path(folder).expanduser().resolve(), Path(staging), HubOptions(trust_remote_code=trust_remote_code))
        files = [file for file in Path(staging).rglob("*") if file.is_file()]
        with refusing(f"cannot push {str(folder)!r} to {repo!r} at {api.endpoint}"):
            made = api.create_repo(repo, private=private, exist_ok=True)
            hidden = not private or api.model_info(made.repo_id).private
        if not hidden:  # the hub leaves a repository that is there as it is
            raise ConfigError(
                f"{made.repo_id} is there already and open to everybody, so that nothing was pushed; make it private "
                "in its settings on the hub, or leave --private out"
            )
        with refusing(f"cannot push {str(folder)!r} to {repo!r} at {api.endpoint}"):
            if not (Path(staging) / CARD).exists():
                write_text(Path(staging) / CARD, card(found, made.repo_id, licence))
            api.upload_folder(
                repo_id=made.repo_id,
                folder_path=staging,
                commit_message="Upload a guided model",
                delete_patterns=["members/*"],
            )
    size = sum(file.stat().st_size for file in files if file.exists())
    return Published(url=str(made), repo=made.repo_id, files=len(files), size=size, licence=licence)


def _stage(source: Path, staging: Path, hub: HubOptions) -> None:
    """Lay out in `staging` what is uploaded, large files as links."""
    spec = MemberSpec(model=str(source))
    base, rewards, _ = taken_apart(spec, hub)
    config = read_guided_config(source)
    bundled(base, rewards.values(), config, staging, _link_folder)
    for file in source.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in _NOT_UPLOADED):
            _link(file, staging / file.name)
    config.save_pretrained(staging)


def _link_folder(reference: str, _: str | None, target: Path) -> bool:
    if not Path(reference).is_dir():
        return False

    def left_out(place: str, names: list[str]) -> set[str]:
        return {*NEVER_COPIED(place, names), *({TRAIN_INPUTS} & {*names})}

    copytree(reference, target, ignore=left_out, copy_function=lambda a, b: _link(Path(a), Path(b)))
    return True


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:  # where links are not allowed
        copyfile(source, target)


# --- the card -------------------------------------------------------------------------------------------------


def card(found: Description, repo: str, licence: str | None) -> str:
    """The README.md of a guided folder at `repo`, with metadata that the hub reads."""
    names = {member.name: _name(member) for member in found.members}
    places = {str(place) for member in found.members for place in (member.model, member.adapter) if _is_hub_id(place)}
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["genarm", "guided-decoding", "text-generation"],
        base_model=sorted(places) or None,
        datasets=sorted({d for member in found.members if (d := _data_set(member)) is not None}) or None,
    )
    rewards = [member for member in found.members if member.weight is not None]
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---",
            f"# {repo.rpartition('/')[2]}: a guided model",
            "",
            f"{names[BASE]} guided while it writes by {len(rewards)} reward{'s' * (len(rewards) != 1)}, each with a "
            "weight that every request may set: log π = log π_base + Σ w · reward − log Z (the method is GenARM, "
            "[arXiv 2410.08193](https://arxiv.org/abs/2410.08193)). Made with genarm.",
            "",
            "| member | weight | what it is | trained by | held-out accuracy | licence |",
            "|---|---|---|---|---|---|",
            *(f"| {' | '.join(_cell(cell) for cell in _row(member))} |" for member in found.members),
            "",
            *_use(repo, rewards, chat=found.files is None or bool(found.files.tokenizer.chat_template)),
            "",
            "## Licences",
            "",
            "Those of the members are in the table; what is derived from them is bound by all of them.",
            "",
        ]
    )


def _row(member: MemberFacts) -> Iterator[str]:
    yield member.name
    yield "" if member.weight is None else f"{member.weight:g}"
    what = f"the wish “{member.wish}”" if member.wish is not None else _name(member)
    compared = "" if member.weight is None or member.reference is None else f", less {member.reference}"
    yield what + compared + (f": {member.description}" if member.description else "")
    trained = member.trained
    beta = f", β_r {trained['beta']:g}" if isinstance(trained.get("beta"), int | float) else ""
    data = f", on {_data_set(member) or Path(str(trained['data'])).name}" if trained.get("data") else ""
    yield f"{trained.get('loss') or trained.get('kind')}{beta}{data}" if trained.get("kind") else ""
    rate, n = (member.figures.get(f"eval_{key}") for key in ("accuracy", "pairs"))
    yield "" if rate is None else f"{rate:.3f}" + ("" if n is None else f" (n={n:.0f})")
    yield "" if member.kind == "wish" else member.licence or "none found"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _name(member: MemberFacts) -> str:
    """A member for readers elsewhere, who know nothing of this machine's folders."""
    model = f"[{member.model}](https://huggingface.co/{member.model})" if _is_hub_id(member.model) else "a model"
    if member.kind == "model":
        return model
    adapter = f"[{member.adapter}](https://huggingface.co/{member.adapter})" if _is_hub_id(member.adapter) else ""
    return f"a LoRA adapter {adapter} on {'the base' if member.model is None else model}".replace("  ", " ")


def _is_hub_id(reference: str | None) -> bool:
    if reference is None or reference.startswith((".", "/", "~")) or Path(reference).exists():
        return False
    return reference.count("/") == 1


def _data_set(member: MemberFacts) -> str | None:
    """The data set on the hub that a member was trained on, if it was."""
    data = member.trained.get("data")
    if not isinstance(data, str) or os.path.isabs(data) or Path(data).exists() or "/" not in data:
        return None
    return "/".join(data.split("/")[:2])


def _use(repo: str, rewards: list[MemberFacts], *, chat: bool) -> list[str]:
    name = next((reward.name for reward in rewards if reward.kind != "wish"), rewards[0].name)
    text = '"How do I boil an egg?"'
    prompt = f'[{{"role": "user", "content": {text}}}]' if chat else text
    return [
        "## Use",
        "",
        "Install genarm (Python 3.11 or newer), then:",
        "",
        "```bash",
        f"genarm chat {repo} --weights {name}=0.7",
        f"genarm serve {repo}      # OpenAI's API, and a page with a slider for each reward",
        "```",
        "",
        "In Python:",
        "",
        "```python",
        "import genarm  # or trust_remote_code=True below, which finds it where it is installed",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{repo}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        f"inputs = model.encode({prompt}, tokenizer=tokenizer)",
        f'answer = model.generate(**inputs, reward_weights={{"{name}": 0.7}}, max_new_tokens=200)',
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
        "```",
    ]


def _common_licence(found: Description) -> str | None:
    """The licence of all members that have files, where it is one that a card may name."""
    licences = {member.licence for member in found.members if member.kind != "wish"}
    only = licences.pop() if len(licences) == 1 else None
    return only if only is not None and " " not in only else None
