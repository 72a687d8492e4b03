"""What the scripts do: one module per script, with its command-line options."""
