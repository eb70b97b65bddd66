"""The `ferry` command: options, exit codes, what is printed. Every command is a few lines over the library."""
