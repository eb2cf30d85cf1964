"""What decides a result, recorded by content beside it: two runs with equal records give equal results.

A record is a mapping of plain values, nested, in which a file stands as a digest of its content. `claim` keeps it
beside an output, and refuses to go on with an output whose record differs, naming the first difference. Where a thing
was found ("at") is kept for the reader and never compared: a folder may move, and a file of the same name may not
change.

What the digests do not cover: of a file of weights above 64 MiB, bytes between the samples (its size, its header, the
beginning of every tensor, and 64 places spread over the file are read); of a data set on the hub, anything but its
name; what a Python function reads or imports from outside of its own folder; versions of libraries, which are noted
beside the record.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

from genarm.errors import DataError
from genarm.files import only_run, write_text

Record: TypeAlias = dict[str, Any]

AT = "at"
"""The key of a record that says where something was found."""

_CONTENT = "content "
_WHOLE = 64 * 2**20
_SAMPLE = 2**16
_SAMPLES = 64
_OF_TENSOR = 2**12

_MODEL_FILES = (
    *("*config.json", "*.safetensors", "*.safetensors.index.json", "*.py"),
    *("token*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "tekken.json"),
    *("*.model", "*.tiktoken", "*.spm", "chat_template*", "additional_chat_templates/*"),
)
"""What decides of a model's folder; cards, logs and checkpoints do not."""


# --- records --------------------------------------------------------------------------------------------------


def plain(record: Mapping[str, Any]) -> Record:
    """`record` as JSON gives it back."""
    found: Record = json.loads(json.dumps(record))
    return found


def digest(record: Mapping[str, Any]) -> str:
    """What rows name their record by: equal exactly where nothing differs but places."""
    return hashlib.sha256(json.dumps(_compared(record), sort_keys=True).encode()).hexdigest()[:16]


def difference(before: Any, now: Any) -> str | None:
    """The first difference between two records in words: "temperature was 0.7 and is 1.0"; None where there is none."""
    return _difference(before, now, [])


def _compared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _compared(item) for key, item in value.items() if key != AT or not _has_place(value)}
    return [_compared(item) for item in value] if isinstance(value, list | tuple) else value


def _difference(before: Any, now: Any, place: list[str]) -> str | None:
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if _compared(before) == _compared(now):
            return None
        if _is_content(before) and _is_content(now):
            return f"{_words(place)} has changed"
        return f"{_words(place)} was {_short(before)} and is {_short(now)}"
    for key in dict.fromkeys((*now, *before)):
        if key == AT and _has_place(now if AT in now else before):
            continue
        name = f"{key} ({now[key][AT]})" if isinstance(now.get(key), Mapping) and _has_place(now[key]) else key
        if key not in now:
            return f"{_words([*place, name])} is there no more"
        if key not in before:
            return f"{_words([*place, name])} was not there"
        if found := _difference(before[key], now[key], [*place, name]):
            return found
    return None


def _words(place: Sequence[str]) -> str:
    """The innermost first, up to a thing that says where it is: "temperature of sampling"."""
    named = [number for number, name in enumerate(place) if name.endswith(")")]
    return " of ".join(reversed(place[named[-1] if named else 0 :]))


def _has_place(record: Mapping[str, Any]) -> bool:
    """Whether its `AT` is where its contents were found, not a reward of that name and its weight or words."""
    return isinstance(record.get(AT), str) and any(
        _is_content(value) or isinstance(value, Mapping) for value in record.values()
    )


def _is_content(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_CONTENT)


def _short(value: Any) -> str:
    text = "another thing" if isinstance(value, Mapping) or _is_content(value) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


# --- outputs --------------------------------------------------------------------------------------------------


def settings_file(path: Path) -> Path:
    """The file beside the output `path` that holds its record."""
    return path.with_name(f"{path.name}.settings.json")


def alone(path: Path, *, noted: Path | None = None) -> AbstractContextManager[None]:
    """Keep other runs from the output `path` from before it is claimed until it is written.

    Args:
        path, noted: as for `claim`.

    Raises:
        DataError: another run is writing it.
    """
    return only_run(path, noted or settings_file(path))


def claim(path: Path, record: Mapping[str, Any], *, noted: Path | None = None, parts: Sequence[Path] = ()) -> str:
    """Take the output `path`, a file or a folder, for what `record` says, or go on with one that says the same.

    Args:
        path: what is written by this run.
        record: all that decides its content.
        noted: where the record is kept; beside the output if None.
        parts: other files of the same output that may be there before it.

    Returns:
        The record's digest.

    Raises:
        DataError: the output was made with another record (the first difference is named), or is not one of ours.
    """
    noted = noted or settings_file(path)
    if not any(_has_content(part, noted) for part in (path, *parts)):
        # A record without content is that of a run that died at once, or whose output was removed to begin anew.
        note(noted, record)
    elif not _has_content(noted, noted):
        raise DataError(
            f"{path} already has content and no {noted.name} {'in' if noted.parent == path else 'beside'} it, so it is "
            "no unfinished output of this command; choose another --output"
        )
    else:
        check(noted, record, path)
    return digest(record)


def check(noted: Path, record: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with `path` where the record in `noted` is not `record` (raises DataError)."""
    otherwise = f"choose another --output, or remove {path}"
    try:
        written = json.loads(noted.read_text(encoding="utf-8"))
        before = written.get("record") if isinstance(written, dict) else None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {noted}: {error}; {otherwise}") from error
    if not isinstance(before, dict):
        raise DataError(f"{noted} has no record of what {path} was made with, as this version writes it; {otherwise}")
    if found := difference(before, plain(record)):
        raise DataError(f"{path} was made with other settings: {found}; go on with the same ones, {otherwise}")


def note(noted: Path, record: Mapping[str, Any], **more: Any) -> None:
    """Write `record` to `noted`, with versions of what has run (raises DataError)."""
    versions = {name: version(name) for name in ("genarm", "torch", "transformers")}
    written = {"digest": digest(record), "record": record, **more, "versions": versions}
    write_text(noted, json.dumps(written, indent=2, ensure_ascii=False) + "\n")


def _has_content(path: Path, noted: Path) -> bool:
    """Whether there is anything; `alone` makes an empty `noted`, which is nothing yet."""
    if path.is_dir():
        return any(inside != noted or inside.stat().st_size > 0 for inside in path.iterdir())
    return path.exists() and path.stat().st_size > 0


# --- content --------------------------------------------------------------------------------------------------


def content_of(items: Iterable[object]) -> str:
    """A digest of values that JSON or `repr` tells apart, in their order."""
    found = hashlib.sha256()
    for item in items:
        found.update(json.dumps(item, sort_keys=True, default=repr).encode() + b"\n")
    return _CONTENT + found.hexdigest()[:16]


def file_content(path: Path, *, sampled: bool = False) -> str:
    """A digest of a file's bytes; of those at the places that this module's head names, if `sampled` and it is large.

    Raises:
        DataError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if not sampled or size <= _WHOLE:
                return _CONTENT + hashlib.file_digest(file, "sha256").hexdigest()[:16]
            found.update(str(size).encode())
            for start, length in _places(file.read(8), size, path):
                file.seek(start)
                found.update(file.read(length))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return _CONTENT + found.hexdigest()[:16]


def _places(beginning: bytes, size: int, path: Path) -> Iterator[tuple[int, int]]:
    """What is read of a large file: the header of safetensors, the beginning of each tensor, and samples."""
    if path.suffix == ".safetensors":
        length = min(int.from_bytes(beginning, "little"), size)
        yield 0, 8 + length
        with path.open("rb") as file:
            file.seek(8)
            header = _json(file.read(length))
        entries = [entry for entry in header.values() if isinstance(entry, dict) and "data_offsets" in entry]
        yield from ((8 + length + int(entry["data_offsets"][0]), _OF_TENSOR) for entry in entries)
    last = size - _SAMPLE
    yield from ((last * number // (_SAMPLES - 1), _SAMPLE) for number in range(_SAMPLES))


def data_record(source: str) -> Record:
    """A data set by its content: a file, the files of a folder, or a name on the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return {AT: str(path), "content": file_content(path)}
    if path.is_dir():
        # All of them, whatever can be read as data; a card may name its splits.
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        shown = [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]
        return {AT: str(path), **{name: file_content(path / name) for name in shown}}
    return {"hub": source}


def code_record(function: Callable[..., Any]) -> Record:
    """The source file of a function, and those that it imports from the same folder or from below it."""
    source = inspect.getsourcefile(inspect.unwrap(function))
    if source is None:
        return {}
    folder = Path(source).resolve().parent
    files: set[Path] = set()
    waiting = [Path(source).resolve()]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += _imported(file, folder)
    return {AT: str(folder), **{str(file.relative_to(folder)): file_content(file) for file in sorted(files)}}


def _imported(file: Path, folder: Path) -> Iterator[Path]:
    """Files in `folder` that the import statements of `file` may mean."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
    for parts in (name.split(".") for name in names):
        for first, last in combinations(range(len(parts) + 1), 2):
            for above in {folder, file.parent}:
                path = above.joinpath(*parts[first:last])
                yield from (p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file())


# --- models ---------------------------------------------------------------------------------------------------


def model_record(reference: str, revision: str | None = None) -> Record:
    """A model by its content: weights, configuration, tokenizer, templates, code.

    Of a guided folder, each member is followed to where it lies; of an adapter, the model that it names.

    Args:
        reference: a folder, or a hub id (ID@REVISION), which stands for the commit that the cache or the hub has.
        revision: of a hub id that has none.

    Raises:
        DataError: a file that is there cannot be read.
    """
    folder = Path(reference).expanduser()
    record = _files(reference, revision, None)
    config = _json_file(folder / "config.json")
    if config.get("model_type") == "guided":
        record.pop("config.json", None)
        record["base"] = _member(config.get("base"), folder)
        rewards = config.get("rewards")
        for reward in rewards if isinstance(rewards, list) else ():
            if isinstance(reward, dict):
                record[f"reward {reward.get('name')}"] = _member(reward, folder)
        return record
    adapter = _json_file(folder / "adapter_config.json")
    host, of_host = adapter.get("base_model_name_or_path"), adapter.get("revision")
    if isinstance(host, str):
        record["model"] = _files(host, of_host if isinstance(of_host, str) and of_host else None, None)
    return record


_FOLLOWED = (
    *("name", "weight", "description"),
    *("model", "revision", "adapter", "adapter_revision", "reference"),
)
"""Of a member, what a run has of its own, and what leads to files; anything else is recorded as it is."""


def _member(spec: Any, folder: Path) -> Record:
    """A member of a guided folder; its name, weight and description decide nothing, since a run has its own."""
    if not isinstance(spec, dict):
        return {}
    models = [
        (spec.get(key), spec.get(f"{prefix}revision")) for key, prefix in (("adapter", "adapter_"), ("model", ""))
    ]
    found = [_files(name, revision, folder) for name, revision in models if isinstance(name, str)]
    own = {key: value for key, value in spec.items() if key not in _FOLLOWED}
    record = {**(found[0] if found else {}), **({"model": found[1]} if len(found) > 1 else {}), **own}
    reference = spec.get("reference")
    if reference is not None:
        record["reference"] = _member(reference, folder) if isinstance(reference, dict) else reference
    return record


def _files(reference: str, revision: str | None, beside: Path | None) -> Record:
    """The files of one folder (a path relative to the folder `beside` wins), or the commit of a hub id."""
    near = beside / reference if beside is not None else Path(reference).expanduser()
    path = near if near.is_dir() else Path(reference).expanduser()
    if not path.is_dir():
        name, _, own = reference.partition("@")
        revision = own or revision
        return {"hub": name, "revision": revision or "main", "commit": _commit(name, revision)}
    files = sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    contents = {str(file.relative_to(path)): file_content(file, sampled=True) for file in files}
    return {AT: str(path.resolve()), **contents}


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub id, from the cache or the hub; None where neither has it, or it is no name."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
            path = found if isinstance(found, str) else hf_hub_download(name, file, revision=revision)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError):
            continue
        return Path(path).parent.name
    return None


def _json_file(path: Path) -> dict[str, Any]:
    try:
        return _json(path.read_bytes())
    except OSError:
        return {}


def _json(text: bytes) -> dict[str, Any]:
    """The object that `text` is; nothing where it is none, which is found out where it is used."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
