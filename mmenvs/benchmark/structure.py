"""The numbers of the probes under names that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_Path = tuple[str, ...]
_WORDS = {
    "cka": "CKA",
    "cka_symbols": "CKA with the scene's symbols",
    "width": "width of a token",
    "linear": "linear probe",
    "knn": "k-NN probe",
    "majority": "most frequent value",
    "count": "number of objects",
}
_LOST = {
    "dropped": "return lost without {}",
    "shuffled": "return lost with {} of another episode",
    "swapped": "return lost with contradicting {}",
}


def measures(structures: Sequence[Any]) -> dict[str, float | str]:
    """Mean over the runs of a configuration of each measure; of what was skipped, why.

    Args:
        structures: ``structure`` of its rows; None or empty where nothing was probed.

    Returns:
        By names such as ``"image: colour of the first object, linear probe"``.
    """
    numbers: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for structure in structures:
        for path, value in _flatten(structure):
            if isinstance(value, str):
                skipped.setdefault(_name(path, structure), f"skipped: {value}")
            elif path[-1] not in ("pool", "queries"):
                numbers.setdefault(_name(path, structure), []).append(value)
    return {**{name: sum(known) / len(known) for name, known in numbers.items()}, **skipped}


def _flatten(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, float | str]]:
    if isinstance(value, dict):
        if isinstance(value.get("skipped"), str):
            yield path, value["skipped"]
            return
        for key, part in value.items():
            yield from _flatten(part, (*path, str(key)))
    elif isinstance(value, int | float) and not isinstance(value, bool) and path:
        yield path, value


def _name(path: _Path, structure: Any) -> str:
    match path:
        case ("use", _, "score"):
            return "return with every modality"
        case ("use", modality, loss) if loss in _LOST:
            return _LOST[loss].format(modality)
        case ("modalities", modality, "probes", symbol, *probe):
            return f"{modality}: {', '.join([_symbol(symbol), *map(_word, probe)])}"
        case ("pairs", pair, "retrieval", direction, recall) if recall.startswith("recall@"):
            pool = structure["pairs"][pair]["retrieval"].get("pool", "all")
            a, _, b = pair.partition("-")
            start, end = (b, a) if direction == "b_to_a" else (a, b)
            first = recall.removeprefix("recall@")
            return f"{start} to {end}: right one among the first {first} of {pool}"
        case ("pairs", pair, *rest):
            return f"{pair.replace('-', ' and ')}: {', '.join(map(_word, rest))}"
        case (_, name, *rest):
            return f"{name}: {', '.join(map(_word, rest))}"
        case _:
            return " ".join(map(_word, path))


def _symbol(symbol: str) -> str:
    if symbol in _WORDS:
        return _WORDS[symbol]
    attribute = symbol.removeprefix("first_")
    return f"{attribute} of {'any' if attribute == symbol else 'the first'} object"


def _word(key: str) -> str:
    return _WORDS.get(key, key.replace("_", " "))
