"""The `ferry` command: options, exit codes and output. Every command is a few lines that call the library."""
