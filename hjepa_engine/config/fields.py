"""How a section of the configuration is declared: a strict dataclass whose fields hold all that is known of a key."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    field_validator,
)
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs, CoreSchema, PydanticCustomError
from typing_extensions import dataclass_transform

from hjepa_engine.config.describe import fields_of, is_section, without_none
from hjepa_engine.config.messages import error_line, too_large
from hjepa_engine.config.paths import expand, unknown_variable
from hjepa_engine.errors import ConfigError

T = TypeVar("T")

#: Whether a key may differ when a run is resumed. ``refuse``: it may not. ``elsewhere``: only when the checkpoint is another
#: run's. ``allow``: it may. ``extend``: it may, and a finished run then goes on.
OnResume = Literal["refuse", "elsewhere", "allow", "extend"]

#: A number within a list: ``list[Positive]``. Other numbers have their bounds in :func:`setting`.
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
ShareOrNone = Annotated[float, Field(ge=0, le=1)]
#: As above, an integer.
Count = Annotated[int, Field(ge=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
#: Two of a kind, also from a list, as YAML has no tuples.
Pair = Annotated[tuple[T, T], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]


def _expanded(value: str) -> str:
    if name := unknown_variable(value):
        raise PydanticCustomError("unknown_variable", "{name}", {"name": name})
    return expand(value)


_EXPAND = AfterValidator(_expanded)
#: A path, in which ``~`` and variables such as ``$HOME`` are replaced by what they stand for.
PathString = Annotated[str, _EXPAND]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, use_attribute_docstrings=True)
#: The section that a section stands in, and its name there; "" where it is an item of a list.
_parents: dict[type, tuple[type, str]] = {}


def setting(
    default: Any,
    *,
    on_resume: OnResume = "refuse",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A key; the string under it describes it.

    Args:
        default: its value, or a function that makes it.
        on_resume: see :data:`OnResume`; of a section, it holds for all of its keys.
        ge: smallest number allowed; ``le``: the largest one.
        gt: number that must be exceeded; ``lt``: that must not be reached.
        le: see ``ge``.
        lt: see ``gt``.
    """
    bounds: dict[str, Any] = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    source = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**source, **bounds, json_schema_extra={"on_resume": on_resume})


@dataclass_transform()
def section(*, frozen: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a class a section: values of the wrong type, out of range or of an unknown name are a ``ConfigError``."""

    def decorate(cls: type[T]) -> type[T]:
        cls.__get_pydantic_core_schema__ = classmethod(_accept_mappings)  # type: ignore[attr-defined]
        cls._fits_64_bits = field_validator("*", mode="before")(_fits_64_bits)  # type: ignore[attr-defined]
        made: Any = dataclass(config=_STRICT, frozen=frozen)(cls)
        for name, field in fields_of(made).items():
            own = without_none(field.annotation)
            for inner in (own, *get_args(own)):
                if is_section(inner):
                    _parents[inner] = (made, name if inner is own else "")
        _raise_config_errors(made)
        return made

    return decorate


def values_of(given: Any) -> dict[str, Any]:
    """The values by name that a section's ``model_validator`` of mode ``before`` is given."""
    values = given.kwargs if isinstance(given, ArgsKwargs) else given
    return values if isinstance(values, dict) else {}


def on_resume(field: FieldInfo) -> OnResume:
    """What was given to :func:`setting`."""
    extra = field.json_schema_extra
    return extra.get("on_resume", "refuse") if isinstance(extra, dict) else "refuse"  # type: ignore[return-value]


def is_path(field: FieldInfo) -> bool:
    """Whether the key is a :data:`PathString`, or null."""
    hints = (field, *get_args(field.annotation))
    return any(_EXPAND in getattr(hint, name, ()) for hint in hints for name in ("metadata", "__metadata__"))


def _accept_mappings(cls: type, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """Values must be of their exact type, but a section may be given as a dict."""
    return {**handler(source), "strict": False}


@classmethod  # type: ignore[misc]
def _fits_64_bits(cls: type, value: Any) -> Any:
    if any(map(too_large, value if isinstance(value, list) else (value,))):
        raise PydanticCustomError("too_large", "must be below 2**63 in size")
    return value


def _raise_config_errors(cls: Any) -> None:
    validate, names = cls.__init__, tuple(fields_of(cls))

    @wraps(validate)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__} takes {len(names)} values, got {len(args)}")
        values = dict(**dict(zip(names, args, strict=False)), **kwargs)
        try:
            validate(self, **values)
        except ValidationError as error:
            raise ConfigError(error_line(*_root_and_prefix(cls), cls, error, values)) from None

    cls.__init__ = init


def _root_and_prefix(cls: type) -> tuple[type, str]:
    """The section that all others are in, and what comes before the keys of this one."""
    root, prefix, listed = cls, "", False
    while root in _parents:
        root, name = _parents[root]
        prefix, listed = f"{name}.{prefix}", listed or not name
    return root, "" if listed else prefix
