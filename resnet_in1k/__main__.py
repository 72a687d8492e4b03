"""`python -m resnet_in1k COMMAND …` and `resnet-in1k COMMAND …`, the same programs as in scripts/."""

import importlib
import sys

COMMANDS = ("train", "evaluate", "predict", "compare", "export", "push-to-hub", "prepare-data", "benchmark")


def main() -> None:
    """Run the command that the first argument names; without one print the list of commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"resnet-in1k {name}"]  # as the parser prints it in usage
        run(name)
    elif name in ("-h", "--help"):
        print(f"usage: resnet-in1k COMMAND [-h] …\n\ncommands: {', '.join(COMMANDS)}")
    else:
        print(f"error: no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def run(command: str) -> None:
    from resnet_in1k.cli.arguments import run_script

    run_script(importlib.import_module(f"resnet_in1k.cli.{command.replace('-', '_')}").main)


if __name__ == "__main__":
    main()
