"""The `swaa` command: it reads arguments and wires rooms; it holds no logic of its own."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command registers itself with."""
