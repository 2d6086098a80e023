"""The `swaa` command: it reads arguments and wires rooms; it holds no logic of its own."""
