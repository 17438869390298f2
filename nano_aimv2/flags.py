"""Flags: one grammar for the command lines of all scripts, built from their dataclasses.

A command's settings are the fields of a dataclass; the comment behind a field is its help text:

    @dataclass
    class Options:
        steps: int = 100  # optimizer steps

    read_flags(["--steps=7"], Options, doc=__doc__)  ->  [{"steps": 7}]

Every command reads `--key=value` and `--key value`, with `-` or `_` inside the key, lists all of
its settings under `--help`, and knows no abbreviations. Values are strict: a boolean is true or
false.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError: whoever calls decides what becomes of it."""

    def error(self, message):
        missing_value = re.match(r"argument (--\w+): expected one argument", message)
        if missing_value:
            flag = missing_value[1]
            message = f"cannot read {flag!r}: it needs a value, {flag}=VALUE"
        raise ValueError(f"{message}; --help lists all settings")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows each setting as `--key=default`."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action):
        if action.metavar is None:  # --help itself
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]}={action.metavar}"


def read_flags(argv, *kinds, doc="", words=None, epilog=None):
    """Read a command line.

    Args:
        argv: the words behind the command's name.
        kinds: dataclasses whose fields are the settings; no two share a field name.
        doc: what --help prints first, a module's docstring; epilog: what it prints last.
        words: the name of the field (a list) that takes the words which are not flags.
    Returns: for each kind a dict of the values that were *given*; `Kind(**values)` has the rest.
    Raises: ValueError that names the word, the rule and the nearest setting; SystemExit (--help).
    """
    parser = Parser(usage=argparse.SUPPRESS, description=doc, epilog=epilog, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=Help)
    fields = [field for kind in kinds for field in dataclasses.fields(kind) if field.name != words]
    notes = {name: note for kind in kinds for name, note in field_notes(kind).items()}
    group = parser.add_argument_group("settings (shown: their defaults)")
    for field in fields:
        group.add_argument(f"--{field.name}", metavar=as_text(field.default),
                           help=notes.get(field.name, "").replace("%", "%%"))
    types = {field.name: field.type for field in fields}
    given = [re.sub(r"^--[^=]+", lambda key: "--" + key[0][2:].replace("-", "_"), w) for w in argv]
    for i, word in enumerate(given):  # --joint is --joint=true: the next word may be a file
        value = "".join(given[i + 1 : i + 2]).lower()
        is_alone = not value or value.startswith("--") or (words and value not in ("true", "false"))
        if types.get(word[2:]) is bool and is_alone:
            given[i] += "=true"
    texts, rest = parser.parse_known_args(given)
    given = {name: parse(name, text, types[name]) for name, text in vars(texts).items()}
    for word in rest:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            raise ValueError(f"unknown flag --{name}{nearest(name, types, '--')}; --help lists all")
        if words is None:
            raise ValueError(f"cannot read {word!r}: write --key=value; --help lists all settings")
    if rest:
        given[words] = rest
    return [{f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
            for kind in kinds]


def parse(name, text, kind):
    """The text of one flag as a value of its type. Raises ValueError with the rule."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(parse(name, part, float) for part in text.split(",")) if text else ()
        value = kind(text)
        if kind is float and not math.isfinite(value):  # nan would pass limits such as `x < 0`
            raise ValueError
        return value
    except (ValueError, KeyError):
        rules = {bool: "true or false", int: "a whole number", float: "a number, not nan or inf",
                 tuple: "numbers with commas between, not nan or inf"}
        raise ValueError(f"--{name}={text} must be {rules[kind]}") from None


def as_text(value):
    """A default value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def field_notes(kind):
    """{field: the comment behind it} of a dataclass."""
    return dict(re.findall(r"^    (\w+): \w+.*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))


def nearest(word, choices, prefix=""):
    """' (did you mean X?)' for a misspelt word, or nothing."""
    found = difflib.get_close_matches(str(word), list(choices), n=1)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""


def check_choice(name, value, choices):
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        near = nearest(value, choices)
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}{near}")


def check_at_least(settings, **least):
    """Raise ValueError unless each named attribute of `settings` has at least its value."""
    for name, value in least.items():
        if not getattr(settings, name) >= value:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least {value}")


def safe_console():
    """Let a file name be printed that the console cannot show: its characters become \\uXXXX."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")


def run_command(main):
    """Run a command's `main(argv)`; a user's mistake ends in one line on stderr and exit code 1."""
    safe_console()
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        sys.exit(f"{Path(sys.argv[0]).stem}: {kind}{error}")
