"""`python -m resnet_in1k COMMAND …` and `resnet-in1k COMMAND …`, the same programs as in scripts/."""

import ast
import importlib
import sys
from pathlib import Path

COMMANDS = {
    "train": "train_options.Arguments",
    "evaluate": "options.EvalOptions",
    "predict": "options.PredictOptions",
    "compare": "options.CompareOptions",
    "export": "options.ExportOptions",
    "push-to-hub": "options.PushOptions",
    "prepare-data": "options.PrepareOptions",
    "benchmark": "train_options.BenchmarkOptions",
}
"""The options of each command, which resnet_in1k/cli/COMMAND.py runs."""


def main() -> None:
    """Run the command that the first argument names; without one print the list of commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        start = "python -m resnet_in1k" if sys.argv[0].endswith("__main__.py") else "resnet-in1k"
        sys.argv[:2] = [f"{start} {name}"]  # as usage and messages have it
        run(name)
    elif name in ("-h", "--help"):
        print(describe_commands())
    else:
        print(f"error: no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def run(command: str) -> None:
    from resnet_in1k.cli.arguments import parse_given, run_script

    def main() -> None:
        parse_given(options_of(command))  # --help and a misspelt flag, before the imports that take seconds
        importlib.import_module(f"resnet_in1k.cli.{command.replace('-', '_')}").main()

    run_script(main)


def options_of(command: str) -> type:
    """Return the dataclass whose fields are the flags of a command."""
    module, _, name = COMMANDS[command].partition(".")
    return getattr(importlib.import_module(f"resnet_in1k.cli.{module}"), name)


def describe_commands() -> str:
    """Return the commands, each with the first line of its module's docstring."""
    lines = ["usage: resnet-in1k COMMAND [FLAGS]", "", "commands:"]
    for name in COMMANDS:
        file = Path(__file__).with_name("cli") / f"{name.replace('-', '_')}.py"  # read, because an import takes seconds
        summary = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
        lines.append(f"  {name:<12}  {summary.splitlines()[0]}")
    lines += ["", "Flags and examples of a command: resnet-in1k COMMAND --help. All of its flags: --help-all."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
