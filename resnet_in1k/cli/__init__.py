"""The programs, one module each, with their command-line options."""
