"""The command line: ``locallip train``, ``compare``, ``certify``, ``explain``, ``audit``, ``info``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from ..build_info import build_info
from ..propagation.graph import UnsupportedModuleError
from .checkpoint import CheckpointError
from .commands import audit, certify, compare, explain, info, train
from .commands.certify import RefutedError
from .comparison import CompareError
from .trainer import TrainingError


def parser() -> argparse.ArgumentParser:
    locallip = argparse.ArgumentParser(
        prog="locallip", description="Train and certify networks against l2 perturbations with local Lipschitz bounds."
    )
    locallip.add_argument("--version", action="version", version=f"locallip_cuda {build_info()['version']}")
    commands = locallip.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in (train, compare, certify, explain, audit, info):
        each.add(commands)
    return locallip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 1 for a failure on the way, 2 for what the user can put right, 128 +
    the signal's number for a training that was stopped."""
    command = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(command)
    try:
        return int(arguments.run(arguments, command))
    except (
        CheckpointError,
        UnsupportedModuleError,
        ValueError,
        FileNotFoundError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        message, code = str(error), 2
    except FileExistsError as error:
        message, code = f"{error} (--resume, --overwrite, --out)", 2
    except (OSError, ImportError, RefutedError, TrainingError, CompareError) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 128 + signal.SIGINT
    print(f"locallip: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
