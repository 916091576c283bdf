"""Generated configurations: each mistake is one line that helps, each way to write a number is read as it was meant.

The mistakes are made out of the sections' own fields (keys, types, bounds), so a new key is tested as soon as it is there;
only the rules of one key against another are written out. The line of a mistake holds, in at most 200 characters,

- the file's name and the whole key (``model.levels[1].pool``);
- the value: as it was written, or as Python spells what was read (``True`` for ``true``, ``-1.0`` for a number ``-1``), cut
  after at least 30 characters with ``...``; of a list that is out of range, the number that is. An unknown key is itself the
  value; a key given twice has the line of the second one instead; where the value is missing there is none;
- what is allowed or meant: the type in words, the choices, the limits, or ``did you mean`` with the whole right key.
"""

import ast
import dataclasses
import inspect
import math
import operator
import os
import random
import re
import subprocess
import sys
import textwrap
import types
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from hjepa_engine import Config, load_config
from hjepa_engine.config import schema as config_module
from hjepa_engine.config.options import list_options
from hjepa_engine.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILE = "configs/experiment.yaml"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a mapping"}
WORDS |= {list: "a list", tuple: "a list"}

# The keys


@dataclasses.dataclass(frozen=True)
class Place:
    """A key or a section, and the YAML around it."""

    section: str
    name: str
    hint: Any
    limits: Any
    before: str
    after: str
    siblings: tuple[str, ...]

    @property
    def key(self) -> str:
        return self.section + self.name

    @property
    def types(self) -> list[Any]:
        """What it may be, besides null."""
        union = get_args(self.hint) if get_origin(self.hint) in (Union, types.UnionType) else (self.hint,)
        return [option for option in union if option is not type(None)]

    @property
    def item(self) -> Any:
        """The type of a list's items; None where it is no list."""
        of = self.types[0]
        return get_args(of)[0] if get_origin(of) in (list, tuple) else None

    @property
    def listed(self) -> bool:
        """Within a list of sections, where the command line does not reach."""
        return "[" in self.key

    def file(self, text: str, name: str | None = None) -> str:
        return f"{self.before}{name or self.name}: {text}{self.after}"


def places(cls: Any = Config, section: str = "", before: str = "{", after: str = "}") -> Iterator[Place]:
    """Every key and section, also those of the sections of a list (as its second one)."""
    hints, fields = get_type_hints(cls), dataclasses.fields(cls)
    for item in fields:
        limits = bounds(get_type_hints(cls, include_extras=True)[item.name], item.default)
        # An item of a list of sections needs its required keys.
        own = before + "".join(f"{name}: a.B, " for name in required(cls) if name != item.name)
        names = tuple(other.name for other in fields)
        place = Place(section, item.name, hints[item.name], limits, own, after, names)
        yield place
        if dataclasses.is_dataclass(place.hint):
            yield from places(place.hint, f"{place.key}.", f"{own}{item.name}: {{", "}" + after)
        elif dataclasses.is_dataclass(place.item):
            first = "".join(f"{name}: a.B" for name in required(place.item))
            inner = f"{own}{item.name}: [{{{first}}}, {{"
            yield from places(place.item, f"{place.key}[1].", inner, "}]" + after)


def bounds(hint: Any, default: Any) -> dict[str, float]:
    """What the field says of its number, or the type of its list's items."""
    markers = [*getattr(default, "metadata", ()), *getattr(hint, "__metadata__", ())]
    found = {name: value for mark in markers for name in BOUNDS if (value := getattr(mark, name, None)) is not None}
    for inner in (*get_args(hint), *(mark for mark in markers if hasattr(mark, "metadata"))):
        found |= bounds(inner, inner)
    return found


def required(cls: Any) -> list[str]:
    fields = dataclasses.fields(cls)
    return [item.name for item in fields if item.default is item.default_factory is dataclasses.MISSING]


PLACES = list(places())
SECTIONS = [place for place in PLACES if dataclasses.is_dataclass(place.hint)]
LEAVES = [place for place in PLACES if place not in SECTIONS]
NUMBERS = [place for place in LEAVES if {int, float} & {place.item, *place.types}]

# The mistakes


@dataclasses.dataclass(frozen=True)
class Mistake:
    """What is written where, and what the line must hold."""

    key: str
    allowed: tuple[str, ...]
    value: tuple[str, ...] = ()
    """The value in each spelling that will do; none: there is none to show."""
    file: str = ""
    words: tuple[str, ...] = ()
    """The command line, instead of a file."""


def both(place: Place, text: str, value: Any, allowed: tuple[str, ...], key: str = "", cli: bool = True):
    """A mistake in a file and, where it can be made there, on the command line."""
    spelled = (text, repr(value))
    yield Mistake(key or place.key, allowed, spelled, file=place.file(text))
    if cli and not place.listed:
        yield Mistake(key or place.key, allowed, spelled, words=(f"--{place.key}", text))


def type_words(place: Place) -> tuple[str, ...]:
    words = ["must be"]
    for option in place.types:
        origin = get_origin(option) or option
        if origin is Literal:
            words += map(str, get_args(option))
        else:
            words.append("a section" if dataclasses.is_dataclass(option) else WORDS[origin])
    return tuple(words)


def limit_words(place: Place) -> tuple[str, ...]:
    return ("must be", *(f"{BOUNDS[name]} {limit}" for name, limit in place.limits.items()))


def misspellings(name: str, draw: random.Random) -> Iterator[str]:
    at = draw.randrange(len(name))
    yield name[:at] + name[at + 1 :]
    yield name[:at] + name[at] + name[at:]
    at = draw.choice([at for at in range(len(name) - 1) if name[at] != name[at + 1]])
    yield name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    yield name.upper()
    for separator in "-.":
        if "_" in name:
            yield name.replace("_", separator)


def typos(draw: random.Random) -> Iterator[Mistake]:
    """Of every key: a letter less, one twice, two swapped, capitals, another separator within the name."""
    for place in PLACES:
        for name in misspellings(place.name, draw):
            key, meant = place.section + name, (f"did you mean {place.key}?",)
            if name and name not in place.siblings:
                yield Mistake(key, meant, file=place.file("1", name))
                if place in LEAVES and not place.listed:
                    yield Mistake(key, meant, words=(f"--{key}", "1"))


def separators(draw: random.Random) -> Iterator[Mistake]:
    """Sections and keys joined by something else; in YAML, also by a point."""
    for place in LEAVES:
        if place.section and not place.listed:
            for separator in "-_/:":
                key = place.key.replace(".", separator)
                yield Mistake(key, (f"did you mean {place.key}?",), file=f'"{key}": 1')
                if separator != ":":
                    yield Mistake(key, (f"did you mean {place.key}?",), words=(f"--{key}", "1"))
            *sections, name = place.key.split(".")
            nested = "".join(f"{section}: {{" for section in sections) + f"{name}: ..." + "}" * len(sections)
            yield Mistake(place.key, (f"did you mean {nested}?",), file=f"{place.key}: 1")


def unknown(draw: random.Random) -> Iterator[Mistake]:
    """Names that are like no key: the line starts to list the known ones."""
    for place in PLACES:
        if place.name == place.siblings[0]:
            for name in ("qqq", "q" * 50, "q" * 300):
                key = place.section + name
                key = key if len(key) < 80 else key[:77] + "..."
                yield Mistake(key, ("known:", place.name), file=place.file("1", name))


#: Values of every kind that YAML knows, as they are written and as they are read.
VALUES: list[tuple[str, Any]] = [
    ("null", None),
    ("true", True),
    ("3", 3),
    ("1.5", 1.5),
    ("2.0", 2.0),
    ("fast", "fast"),
    ("'3'", "3"),
    ("'true'", "true"),
    ("yes", "yes"),
    ("''", ""),
    ("x" * 300, "x" * 300),
    ('"two\\nlines"', "two\nlines"),
    ("[fast, 1]", ["fast", 1]),
    (f"[{'1, ' * 99}x]", [1] * 99 + ["x"]),
    ("[]", []),
    ("{a: 1}", {"a": 1}),
]


def fits(place: Place, value: Any) -> bool:
    """Whether a value is of a type that the key takes; a list with wrong items is tested as such."""
    if value is None:
        return place.hint not in place.types
    for option in place.types:
        origin = get_origin(option) or option
        if origin is Literal:
            found = value in get_args(option)
        elif dataclasses.is_dataclass(option):
            found = isinstance(value, dict)
        elif origin is tuple:
            found = isinstance(value, list) and len(value) == len(get_args(option))
        elif origin is str:
            found = isinstance(value, str) and value != ""
        elif origin is float:
            found = type(value) in (int, float)
        else:
            found = type(value) is origin
        if found:
            return True
    return False


def wrong_types(draw: random.Random) -> Iterator[Mistake]:
    """Of every key and section: every kind of value that it does not take."""
    for place in PLACES:
        for text, value in VALUES:
            if not fits(place, value):
                cli = place in LEAVES and str not in place.types  # there, all is a string
                yield from both(place, text, value, type_words(place), cli=cli)


def wrong_items(draw: random.Random) -> Iterator[Mistake]:
    """Lists with a wrong item, or too short or too long; mappings with keys that are no strings."""
    for place in LEAVES:
        if place.item is not None:
            item = dataclasses.replace(place, name=f"{place.name}[0]", hint=place.item)
            fixed = get_origin(place.types[0]) is tuple
            for text, value in VALUES:
                if not fits(item, value):
                    full = f"[{text}, {text}]" if fixed else f"[{text}]"
                    expected = type_words(item)
                    yield Mistake(item.key, expected, (text, repr(value)), file=place.file(full))
                    if not place.listed:
                        yield Mistake(item.key, expected, (text, repr(value)), words=(f"--{place.key}", full))
            if fixed:
                size = len(get_args(place.types[0]))
                for numbers in ([], [0.5] * (size - 1), [0.5] * (size + 1)):
                    yield from both(place, str(numbers), numbers, (f"must be a list of {size} ",))
        if dict in map(get_origin, place.types):
            yield from both(place, "{1: 2}", {1: 2}, ("must be a mapping", "strings"))


def literals(draw: random.Random) -> Iterator[Mistake]:
    """Misspelt choices, booleans of another language."""
    for place in LEAVES:
        choices = [name for option in place.types if get_origin(option) is Literal for name in get_args(option)]
        for choice in choices:
            for text in (choice[:-1], choice + "s", choice.upper()):
                if text not in choices:
                    yield from both(place, text, text, ("must be", *choices))
        if bool in place.types:
            for text in ("yes", "off", "True_", "y"):
                yield from both(place, text, text, ("must be ", "true or false"))


def outside(place: Place) -> Iterator[Any]:
    """Numbers just outside of the limits, and far outside."""
    for name, limit in place.limits.items():
        way = -1 if name in ("ge", "gt") else 1
        itself = name in ("gt", "lt")
        if int in place.types:
            nearest = limit if itself else limit + way
            yield from (nearest, nearest + way, nearest + way * 1000)
        else:
            nearest = float(limit) if itself else math.nextafter(limit, way * math.inf)
            yield from (nearest, limit + way * 1.5, way * 1e30)


def with_number(place: Place, text: str, draw: random.Random) -> str:
    """The number, or a list with it as one of the items."""
    if place.item is None:
        return text
    good = repr(next(value for value in (0.5, 1.0, 1, 2) if inside(place, value)))
    size = len(get_args(place.types[0])) if get_origin(place.types[0]) is tuple else draw.choice([1, 3, 40])
    numbers = [good] * size
    numbers[draw.randrange(size)] = text
    return f"[{', '.join(numbers)}]"


def inside(place: Place, value: float) -> bool:
    compare = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    return all(compare[name](value, limit) for name, limit in place.limits.items())


def ranged(place: Place, text: str, value: Any, allowed: tuple[str, ...], draw: random.Random, key: str = ""):
    """A number that is out of range, by itself or in a list."""
    for mistake in both(place, with_number(place, text, draw), value, allowed, key):
        yield dataclasses.replace(mistake, value=(text, repr(value)))


#: Keys that take a list of numbers, or a word: a number alone is of the wrong type.
LISTS = {"data.mean", "data.std"}


def out_of_range(draw: random.Random) -> Iterator[Mistake]:
    """Of every limited key: just outside and far outside, on each side that has an end; negative numbers are among them."""
    for place in LEAVES:
        if place.limits and place.key not in LISTS:
            for value in outside(place):
                yield from ranged(place, repr(value), value, limit_words(place), draw)


def not_finite(draw: random.Random) -> Iterator[Mistake]:
    """Of every number: not a number, infinite, or too large for a float."""
    for place in NUMBERS:
        for text in (".nan", ".inf", "-.inf", "+.inf", "1e999"):
            value = float(text.replace(".", "")) if text != "1e999" else math.inf
            if int in place.types:
                yield from both(place, text, value, type_words(place))
            else:
                yield from ranged(place, text, value, (*limit_words(place), "finite"), draw)


def huge(draw: random.Random) -> Iterator[Mistake]:
    """Of every number: integers that no 64 bits hold, up to more digits than Python reads."""
    for place in NUMBERS:
        for number in (2**63, -(2**63), 10**30, 10**400):
            key, text = place.key, str(number)
            if place.item is not None:
                key, text = f"{key}[0]", f"[{number}, {number}]"
            for mistake in both(place, text, number, ("must be", "below 2**63"), key):
                yield dataclasses.replace(mistake, value=(str(number),))
        if place.item is None:
            yield from both(place, "9" * 5000, "9" * 5000, type_words(place))


def twice(draw: random.Random) -> Iterator[Mistake]:
    """Of every key and section: given twice."""
    for place in PLACES:
        text = f"{place.before}{place.name}: 1,\n{place.name}: 2{place.after}"
        yield Mistake(place.key, ("given twice", "line 2"), file=text)


def missing(draw: random.Random) -> Iterator[Mistake]:
    """Required keys that are not there; command lines that end too early."""
    for place in PLACES:
        if dataclasses.is_dataclass(place.item):
            for name in required(place.item):
                yield Mistake(f"{place.key}[0].{name}", ("must be given",), file=place.file("[{}]"))
        if place in LEAVES and not place.listed:
            yield Mistake(place.key, ("needs a value",), words=(f"--{place.key}",))


def broken_yaml(draw: random.Random) -> Iterator[Mistake]:
    """Values on the command line that are no YAML."""
    for place in LEAVES:
        if not place.listed and str not in place.types:
            for text in ("[0.9", "'x", "{a: ", "*x", "!!python/name:os.system", "a: b: c"):
                yield Mistake(place.key, ("no valid YAML",), (text, repr(text)), words=(f"--{place.key}", text))


RANDOM = "masking: {type: random}, model: {predictor: {targets: joint}"
#: One key against another: file, key, value, what the line says of the others.
CROSS = [
    ("data: {crop_scale: [0.5, 0.4]}", "data.crop_scale", "[0.5, 0.4]", "ordered, smallest first"),
    ("data: {crop_ratio: [2, 1]}", "data.crop_ratio", "[2.0, 1.0]", "ordered, smallest first"),
    ("masking: {mask_scale: [0.2, 0.1]}", "masking.mask_scale", "[0.2, 0.1]", "ordered, smallest first"),
    ("masking: {aspect_ratio: [1.5, 0.75]}", "masking.aspect_ratio", "[1.5, 0.75]", "ordered, smallest first"),
    ("masking: {context_scale: [1, 0.9]}", "masking.context_scale", "[1.0, 0.9]", "ordered, smallest first"),
    ("masking: {context_keep: [0.3, 0.2]}", "masking.context_keep", "[0.3, 0.2]", "ordered, smallest first"),
    ("masking: {type: random}", "model.predictor.targets", "independent", "must be joint where masking.type is random"),
    (f"{{{RANDOM}, levels: [{{pool: 2}}]}}}}", "model.levels", "[2]", "pool 1 or image where masking.type"),
    (f"{{{RANDOM}, num_hierarchies: 2}}}}", "model.num_hierarchies", "2", "null or 1 where masking.type"),
    ("data: {download: true}", "data.download", "True", "must be false where data.dataset is digit_pages"),
    ("data: {in_chans: 4, rand_augment: 2}", "data.rand_augment", "2", "must be 0 for images of 4 channels"),
    ("data: {in_memory: true, dataset: passed}", "data.in_memory", "True", "must be false for a data set of your own"),
    ("data: {hub_name: a/b}", "data.hub_name", "a/b", "must be null where data.dataset is digit_pages"),
    ("data: {mean: [0.5, 0.5]}", "data.mean", "[0.5, 0.5]", "must have one value per channel (1)"),
    ("{run_dir: x, data: {dataset: imagefolder, data_path: x/y}}", "data.data_path", "x/y", "must not be in the run folder"),
    ("model: {embed_dim: 20, num_heads: 3}", "model.num_heads", "3", "must divide model.embed_dim (20)"),
    ("data: {download: true, dataset: fake}", "data.download", "True", "must be false where data.dataset is fake"),
    ("model: {levels: []}", "model.levels", "[]", "at least one level"),
    ("model: {num_hierarchies: 2, levels: [{}]}", "model.num_hierarchies", "2", "the number of model.levels (1)"),
    ("{model: {levels: [{}]}, loss: {hierarchy_weights: [2]}}", "loss.hierarchy_weights", "[2.0]", "null where model.lev"),
    ("loss: {hierarchy_weights: [1, 1, 1]}", "loss.hierarchy_weights", "3", "one value per level (2)"),
    ("{model: {num_hierarchies: 1}, training: {level_lrs: [1, 1]}}", "training.level_lrs", "2", "one value per level (1)"),
    ("training: {level_lrs: []}", "training.level_lrs", "0", "one value per level (2)"),
    ("loss: {hierarchy_weights: [0, 0]}", "loss.hierarchy_weights", "[0.0, 0.0]", "at least one level above 0"),
    ("model: {levels: [{weight: 0}, {weight: 0}]}", "model.levels", "[0.0, 0.0]", "at least one level above 0"),
    ("training: {epochs: 5, warmup_epochs: 5.5}", "training.warmup_epochs", "5.5", "at most training.epochs (5)"),
    ("training: {epochs: 9, warmup_epochs: 10}", "training.warmup_epochs", "10.0", "at most training.epochs (9)"),
    ("model: {ema: {momentum_warmup_epochs: 21}}", "model.ema.momentum_warmup_epochs", "21.0", "training.epochs (20)"),
    ("training: {lr: 1e-3, min_lr: 1e-2}", "training.min_lr", "0.01", "at most training.lr (0.001)"),
    ("training: {start_lr: 2}", "training.start_lr", "2.0", "at most training.lr (0.001)"),
    ("model: {ema: {momentum_start: 0.5}}", "model.ema.momentum_start", "0.5", "null without model.ema.momentum_war"),
    ("training: {start_lr: 1e-4, warmup_epochs: 0}", "training.start_lr", "0.0001", "0 without training.warmup_epochs"),
    ("training: {min_lr: 2}", "training.min_lr", "2.0", "at most training.lr (0.001)"),
    ("model: {patch_size: 5}", "data.image_size", "32", "a multiple of model.patch_size (5)"),
    ("{data: {image_size: 23}, model: {patch_size: 4}}", "data.image_size", "23", "multiple of model.patch_size (4)"),
    ("model: {predictor: {width: 8, num_heads: 3}}", "model.predictor.width", "8", "of 4 and of num_heads (3)"),
    ("model: {predictor: {width: 6, num_heads: 1}}", "model.predictor.width", "6", "of 4 and of num_heads (1)"),
    ("model: {embed_dim: 18}", "model.embed_dim", "18", "a multiple of 4"),
    ("model: {init_parts: [predictor]}", "model.init_parts", "['predictor']", "null without model.init_from"),
    ("model: {init_from: x, init_parts: []}", "model.init_parts", "[]", "must name at least one module, or be null"),
    ("model: {init_from: x, init_parts: [a, b, a]}", "model.init_parts", "['a', 'b', 'a']", "must name each module once"),
    ("logging: {watch: all, watch_frequency: 75}", "logging.watch_frequency", "75", "a multiple of log_frequency (50)"),
    ("guard: {rules: [{metric: m}]}", "guard.rules[0]", "none", "one of below, above, drop, spike and non_finite"),
    ("guard: {rules: [{metric: m, below: 1, drop: 0.5}]}", "guard.rules[0]", "below and drop", "must have one of below"),
    (
        "{guard: {rules: [{metric: m, below: 1, action: rollback}]}, checkpoint: {save_frequency: null, "
        "save_every_minutes: null}}",
        "guard.rules[0].action",
        "rollback",
        "warn or stop where no checkpoints are saved",
    ),
    ("checkpoint: {metric: collapse/target_rank}", "checkpoint.mode", "min", "max where checkpoint.metric is collapse/targ"),
    ("collapse: {lidar_views: 1}", "collapse.lidar_views", "1", "0 or at least 2"),
    *(
        (f"logging: {{experiment_name: {name!r}}}", "logging.experiment_name", repr(name), "a name without '/'")
        for name in (".", "..", "a/b", "/", "b" * 300 + "/")
    ),
    *(
        (f"device: {name!r}", "device", repr(name), "must be auto, cpu, cuda or cuda:N")
        for name in ("gpu", "cud", "GPU:1", "mps:0", "c" * 300)
    ),
    *(
        (f"model: {{levels: [{{}}, {{pool: {pool}}}]}}", "model.levels[1].pool", str(pool), "a positive integer or 'image'")
        for pool in (0, -1, -1000)
    ),
]  # fmt: skip


def crosswise(draw: random.Random) -> Iterator[Mistake]:
    """Every rule of one key against another, and those that no type and limit can say."""
    for text, key, value, says in CROSS:
        yield Mistake(key, (says,), (value,) if value else (), file=text)


MAKERS = (
    typos,
    separators,
    unknown,
    wrong_types,
    wrong_items,
    literals,
    out_of_range,
    not_finite,
    huge,
    twice,
    missing,
    broken_yaml,
    crosswise,
)


@cache
def mistakes(kind: Any) -> list[Mistake]:
    """What one of the makers makes, always the same."""
    return list(dict.fromkeys(kind(random.Random(kind.__name__))))


# What the line must hold


def load(mistake: Mistake, path: str = FILE) -> str | None:
    """The line of a mistake; None where it was accepted."""
    if not mistake.words:
        Path(path).write_text(mistake.file, encoding="utf-8")
    try:
        load_config(None if mistake.words else path, mistake.words)
    except ConfigError as error:
        return str(error)
    return None


def faults(mistake: Mistake) -> list[str]:
    """What is wrong with the line of a mistake."""
    try:
        line = load(mistake)
    except Exception as error:
        return [f"a {type(error).__name__} instead of a ConfigError: {error}"]
    if line is None:
        return ["accepted"]
    wrong = []
    if len(line.splitlines()) != 1:
        wrong.append("not one line")
    if len(line) > 200:
        wrong.append(f"{len(line)} characters")
    if not mistake.words and not line.startswith(f"{FILE}: "):
        wrong.append("no file")
    if not re.search(rf"(?<![\w.-]){re.escape(mistake.key)}(?![-\w\[]|\.\w)", line):
        wrong.append(f"no key {mistake.key}")
    if mistake.value and not shows(line, mistake.value):
        wrong.append(f"no value {mistake.value[0][:50]}")
    wrong += [f"no {words!r}" for words in mistake.allowed if words not in line]
    return [f"{', '.join(wrong)}: {line}"] if wrong else []


def shows(line: str, spellings: tuple[str, ...]) -> bool:
    """Whether the line ends with the value, or with the start of it."""
    said = line.partition(", got ")[2]
    said = re.sub(r"(, did you mean .*\?|, whose .*)$", "", said)
    starts = {said, said.partition(" in [")[0]}
    return any(
        start == spelling or (start.endswith("...") and len(start) > 32 and spelling.startswith(start[:-3]))
        for start in starts
        for spelling in spellings
    )


@pytest.fixture(autouse=True)
def short_name(tmp_path, monkeypatch):
    """The file's name is as long as names are, wherever temporary folders are."""
    monkeypatch.chdir(tmp_path)
    Path(FILE).parent.mkdir()


@pytest.mark.parametrize("kind", MAKERS, ids=lambda kind: kind.__name__)
def test_a_generated_mistake_is_one_line_with_key_value_and_remedy(kind, tmp_path):
    found = [
        f"{mistake.words or mistake.file[:120]}\n    {fault}" for mistake in mistakes(kind) for fault in faults(mistake)
    ]
    assert not found, f"{len(found)} of {len(mistakes(kind))}:\n" + "\n".join(found)
    assert {path.name for path in tmp_path.rglob("*")} <= {"configs", "experiment.yaml"}


def test_the_generated_mistakes_are_many_and_reach_every_key():
    numbers = Counter({kind.__name__: len(mistakes(kind)) for kind in MAKERS})
    assert numbers.total() >= 1000 and all(numbers.values()), numbers
    keys = {place.key for place in LEAVES if not place.listed}
    assert keys == {option.key for option in list_options()}
    for kind in (typos, wrong_types, twice):
        text = "\n".join(" ".join((mistake.key, *mistake.allowed)) for mistake in mistakes(kind))
        assert not [place.key for place in PLACES if place.key not in text], kind.__name__
    limited = {place.key for place in LEAVES if place.limits} - LISTS
    assert limited and limited <= {mistake.key for mistake in mistakes(out_of_range)}


def test_every_rule_of_one_key_against_another_is_broken_once():
    body = ast.parse(textwrap.dedent(inspect.getsource(config_module.broken_rules)))
    rules = [
        [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        for node in ast.walk(body)
        if isinstance(node, ast.Yield)
    ]
    lines = [load(mistake) or "" for mistake in mistakes(crosswise)]
    unbroken = [rule for rule in rules if not any(all(part in line for part in rule) for line in lines)]
    # Empty strings are refused before any rule; from Python the rule is reached.
    assert len(rules) > 10 and not [rule for rule in unbroken if not rule[-1].endswith("got ''")], unbroken


def test_the_command_ends_generated_mistakes_with_code_2_and_creates_nothing(tmp_path):
    draw, environment = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1"}
    running = []
    for kind in (typos, wrong_types, out_of_range, crosswise):
        mistake = draw.choice([mistake for mistake in mistakes(kind) if not mistake.words])
        folder = tmp_path / kind.__name__
        folder.mkdir()
        (folder / "run.yaml").write_text(mistake.file)
        command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "--config", "run.yaml"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)
        running.append((folder, load(mistake, f"{kind.__name__}/run.yaml"), process))
    for folder, line, process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (2, "", f"{line}\n".removeprefix(f"{folder.name}/"))
        assert [path.name for path in folder.iterdir()] == ["run.yaml"]


# What is right


def spellings(digits: int, exponent: int) -> list[str]:
    """Ways to write digits * 10 ** exponent, a number above 0."""
    text, plain = str(digits), f"{Decimal(digits).scaleb(exponent):f}"
    return [
        f"{text}e{exponent}",
        f"{text}E{exponent:+03d}",
        f"+{text}e{exponent}",
        f".{text}e{exponent + len(text)}",
        f"{text[0]}.{text[1:] or '0'}e{exponent + len(text) - 1}",
        f"{text}.E{exponent}",
        f"0{text}.0e{exponent:+d}",
        plain,
        plain.removeprefix("0") if "." in plain else f"+{plain}",
        f"+{plain}",
    ]  # fmt: skip


def accepted(place: Place, value: Any) -> Config | None:
    """The configuration as Python makes it; None where the sections refuse the value."""

    def put(node: Any, names: list[str]) -> Any:
        inner = put(getattr(node, names[0]), names[1:]) if names else value
        return dataclasses.replace(node, **{names[0]: inner}) if names else value

    try:
        return put(Config(), place.key.split("."))
    except ConfigError:
        return None


def good_numbers() -> Iterator[tuple[Place, str, Any, Config]]:
    """Of every key that is a number: in every spelling, what the sections take."""
    draw = random.Random(0)
    for place in NUMBERS:
        # The last one is refused without a warm-up: CROSS has it.
        if place.item is not None or place.listed or place.key == "model.ema.momentum_start":
            continue
        whole = int in place.types
        found = 0
        for number in range(200):
            digits = draw.choice([1, 3, 5, 15, 27, 125, 8, 400, 996])
            exponent = 0 if whole else draw.choice([-5, -4, -3, -2, -1, 0, 1, 3, 4])
            ways = [f"+{digits}", str(digits), f"00{digits}"] if whole else spellings(digits, exponent)
            value = digits if whole else float(Fraction(digits) * Fraction(10) ** exponent)
            config = accepted(place, value)
            if config is not None:
                yield place, ways[number % len(ways)], value, config
                found += 1
            if found == 6:
                break
        assert found, f"{place.key} takes none of the numbers"


def test_numbers_are_read_as_they_were_meant_however_they_are_written():
    good, wrong = list(good_numbers()), []
    for place, text, value, expected in good:
        Path(FILE).write_text(place.file(text))
        for words in ((FILE, []), (None, [f"--{place.key}", text])):
            try:
                found = load_config(*words)
            except ConfigError as error:
                wrong.append(f"{place.key}: {text}: {error}")
                continue
            read = found
            for name in place.key.split("."):
                read = getattr(read, name)
            if found != expected or read != value or type(read) is not type(value):
                wrong.append(f"{place.key}: {text} was read as {read!r}, not as {value!r}")
    assert not wrong, "\n".join(wrong)
    texts = " ".join(text for _, text, _, _ in good).split()
    assert len(good) >= 100
    for shape in (r"\d+e-\d", r"\d+E-0\d", r"\.\d+", r"\+\d+", r"\d+\.\d+e\d", r"\d+\.E\d", r"0\d+"):
        assert any(re.fullmatch(shape, text) for text in texts), f"none like {shape} in {texts}"
