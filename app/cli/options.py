"""Options shared by commands: the PiSSA config, field by field, as the command line spells it."""

from __future__ import annotations

import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from app.cli.kinds import Device, JobId, Size
from pissa_core.errors import InvalidConfig
from pissa_core.spec import PissaConfig

P = ParamSpec("P")
R = TypeVar("R")

# What no module path holds: a value with one of these is meant as a regular expression.
_REGEX = re.compile(r"[\\^$*+?()\[\]{}|]")
# Where PEFT reads a string as a regular expression and a list as path endings.
_PATTERN_FIELDS = ("target_modules", "exclude_modules")
# The words that PEFT understands instead of either.
_WORDS = ("all-linear",)


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of the config: its path (``("svd", "method")``) and its pydantic field."""

    path: tuple[str, ...]
    field: FieldInfo

    @property
    def parameter(self) -> str:
        """The name click hands the value over by; no command's own option begins like it."""
        return "pissa_" + "_".join(self.path)

    @property
    def flag(self) -> str:
        """The option as typed, ``--svd-method``."""
        return "--" + "-".join(self.path).replace("_", "-")

    @property
    def leaves(self) -> frozenset[Any]:
        """The plain types that the annotation allows, ``Annotated`` and None aside."""
        return frozenset(_leaves(self.field.annotation))


def settings(model: type[BaseModel] = PissaConfig, above: tuple[str, ...] = ()) -> list[Setting]:
    """Return every leaf of the config, nested models flattened."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += settings(field.annotation, (*above, name))
        else:
            found.append(Setting((*above, name), field))
    return found


def config_options(command: Callable[P, R]) -> Callable[..., R]:
    """Give a command ``--config`` and one option a field; it receives their sum as `pissa`.

    `pissa` is the object that REST takes under that name; it is not validated yet.
    """
    fields = settings()

    @functools.wraps(command)
    def with_config(*args: Any, config_file: Path | None, **kwargs: Any) -> R:
        given = {setting: kwargs.pop(setting.parameter) for setting in fields}
        base = {} if config_file is None else read_config_file(config_file)
        kwargs["pissa"] = merged(base, given)
        return command(*args, **kwargs)

    decorated: Callable[..., R] = with_config
    for setting in reversed(fields):
        decorated = _option(setting)(decorated)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="JSON or YAML file with the config's fields; options win over it.",
    )(decorated)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds one object."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            data = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidConfig(f"{path} is neither JSON nor YAML: {reason}") from error
    if not isinstance(data, dict):
        raise InvalidConfig(
            f"{path} holds {type(data).__name__}, not an object of config fields",
            hint='write {"rank": 16, "svd": {"method": "auto"}}',
        )
    return data


def merged(base: Mapping[str, Any], given: Mapping[Setting, Any]) -> dict[str, Any]:
    """Lay the options that were given over the config file's fields."""
    result = dict(base)
    for setting, value in given.items():
        if value is None or value == ():
            continue
        _make_room(result, setting)
        target = result
        for name in setting.path[:-1]:
            inner = target.get(name)
            target[name] = target = dict(inner) if isinstance(inner, Mapping) else {}
        target[setting.path[-1]] = parse_value(setting, value)
    return result


def parse_value(setting: Setting, value: Any) -> Any:
    """Turn what was typed for one option into the JSON value it stands for.

    Numbers that are none stay strings: the config refuses them by name, as it does for REST.
    """
    if dict in setting.leaves:
        return _json_object(setting, value)
    if list in setting.leaves:
        return _list_or_pattern(setting, value)
    if bool not in setting.leaves and setting.leaves & {int, float}:
        return _number(value)
    return value


_LIMITS = ("slots", "memory_budget", "disk_budget", "max_shard_size")

max_shard_size_option = click.option(
    "--max-shard-size",
    type=Size(),
    metavar="SIZE",
    help="Size of the files that a shard too large for the disk budget becomes; default: 5GB. "
    "Nothing else is divided.",
)

job_argument = click.argument("job_id", metavar="ID", type=JobId())


disk_budget_option = click.option(
    "--disk-budget",
    envvar="PISSA_DISK_BUDGET",
    type=Size(),
    metavar="SIZE",
    help="Disk that work in progress may take, such as 20GB; a shard of a model that alone would "
    "take more is divided.",
)

memory_budget_option = click.option(
    "--memory-budget",
    type=Size(),
    metavar="SIZE",
    help="Memory that matrices in flight may take together, beside what Python and torch take, "
    "such as 4GB; fewer in flight keep to it.",
)

slots_option = click.option(
    "--slots",
    type=click.IntRange(min=1),
    help="Matrices in flight at once; default: what device and memory allow.",
)


def budget_options(command: Callable[P, R]) -> Callable[..., R]:
    """``--slots``, ``--memory-budget`` and the like: how much of the machine may be used.

    The command receives them together, as `limits`: a mapping of names to numbers or None.
    """

    @functools.wraps(command)
    def with_limits(*args: Any, **kwargs: Any) -> R:
        kwargs["limits"] = {name: kwargs.pop(name) for name in _LIMITS}
        return command(*args, **kwargs)

    decorated: Callable[..., R] = with_limits
    for option in (
        max_shard_size_option,
        disk_budget_option,
        memory_budget_option,
        slots_option,
    ):
        decorated = option(decorated)
    return decorated


device_option = click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="Where the arithmetic runs; auto takes a GPU where there is one.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def _option(setting: Setting) -> Callable[[Callable[P, R]], Callable[P, R]]:
    name, leaves = setting.parameter, setting.leaves
    described = setting.field.description or "As in PEFT's LoraConfig."
    if bool in leaves:
        negative = "--no-" + setting.flag.removeprefix("--")
        return click.option(f"{setting.flag}/{negative}", name, default=None, help=described)
    default = setting.field.get_default(call_default_factory=True)
    shown = "" if default is None or default == {} else f"  [default: {default}]"
    return click.option(
        setting.flag,
        name,
        multiple=list in leaves,
        metavar=_metavar(leaves),
        help=described + shown,
    )


def _metavar(leaves: frozenset[Any]) -> str:
    if dict in leaves:
        return "JSON"
    if list in leaves:
        return "NAME[,NAME…]" if str in leaves else "N[,N…]"
    if leaves & {int, float}:
        return "NUMBER" if float in leaves else "N"
    words = sorted(str(leaf) for leaf in leaves if isinstance(leaf, str))
    return "|".join(words) if words else "TEXT"


def _leaves(annotation: Any) -> Iterator[Any]:
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _leaves(typing.get_args(annotation)[0])
    elif origin in (types.UnionType, typing.Union):
        for part in typing.get_args(annotation):
            yield from _leaves(part)
    elif origin is typing.Literal:
        yield from typing.get_args(annotation)
    elif annotation is not type(None):
        yield origin or annotation


def _make_room(result: dict[str, Any], setting: Setting) -> None:
    """Drop what the file says in PEFT's spelling where an option says it in ours, and back."""
    if setting.path == ("svd", "method"):
        result.pop("init_lora_weights", None)
    if setting.path == ("init_lora_weights",) and isinstance(result.get("svd"), Mapping):
        spelled = ("method", "niter")
        result["svd"] = {key: v for key, v in result["svd"].items() if key not in spelled}


def _json_object(setting: Setting, text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidConfig(
            f"{setting.flag} {text!r} is not JSON: {error}",
            hint=f"write {setting.flag} '{{\"q_proj\": 8}}'",
        ) from error
    if not isinstance(value, dict):
        raise InvalidConfig(f"{setting.flag} {text!r} is JSON, but not an object")
    return value


def _list_or_pattern(setting: Setting, typed: tuple[str, ...]) -> Any:
    is_pattern_field = setting.path[-1] in _PATTERN_FIELDS
    if is_pattern_field and len(typed) == 1 and "," not in typed[0]:
        (only,) = typed
        if only in _WORDS or _REGEX.search(only):
            return only
    items = [item.strip() for value in typed for item in value.split(",")]
    items = [item for item in items if item]
    odd = next((item for item in items if is_pattern_field and _REGEX.search(item)), None)
    if odd is not None:
        raise InvalidConfig(
            f"{setting.flag}: {odd!r} in a list is no path ending, and a regular expression "
            "must stand alone and without a comma",
            hint=f'put a regular expression with a comma into --config as "{setting.path[-1]}"',
        )
    return [_number(item) for item in items] if int in setting.leaves else items


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
