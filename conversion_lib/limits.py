"""The limits on what comes from outside: checkpoints, the Hub, buckets, catalogues, golden files.

Each is far above anything published, and is checked before memory is taken or numbers are multiplied. Sizes that a
file states are compared with the file itself where they are read; what is here is for what has nothing to be compared
with.
"""

from __future__ import annotations

JSON_BYTES = 100_000_000
"""A JSON file, and a safetensors header, for which the safetensors package has the same limit. The largest published
header has about 10 MB."""

JSON_DEPTH = 100
"""Levels of objects and lists. Published configs have up to 6. Much deeper ones end programs that recurse."""

INTEGER_DIGITS = 40
"""Of a JSON integer: twice those of 64 bits. Python takes quadratic time for more, and multiplies them."""

STORED_BYTES = 1 << 29
"""A file or object that is read as a whole and is not JSON from outside: plans and journals of the largest models have
about 100 MB."""

YAML_BYTES = 4_000_000
"""A YAML file: MaxText's largest has 60 kB. PyYAML reads about 100 kB a second."""

YAML_DEPTH = 50
"""Levels of mappings and sequences."""

YAML_NODES = 200_000
"""Values of a YAML file, with those that aliases repeat."""

PATTERNS = 1_000
"""Regular expressions in a config. Published ones have up to 20."""

PATTERN_CHARACTERS = 2_000
"""Of one regular expression."""

PATTERN_TRIES = 20_000_000
"""Patterns times names to match them with: half a minute."""

GOLDEN_EXPANSION = 16
"""Bytes of a golden file's arrays for each byte of the file. Logits hardly compress; text and bfloat16 take a quarter
to double of their float32."""

GOLDEN_FREE_BYTES = 64 << 20
"""Arrays up to this size are read from a golden file of any size."""

GOLDEN_LINE_BYTES = 1 << 30
"""A line of MaxText's .jsonl: its JSON has about 20 bytes for each logit."""

HEADER_BYTES = 100_000_000
"""Of a safetensors file: the limit of the safetensors package."""

NPY_HEADER_BYTES = 10_000
"""The header of an array, as numpy limits it."""

MESSAGE_CHARACTERS = 2_000
"""Of an error or a line of progress; longer names and lists are cut."""

NAME_CHARACTERS = 200
"""Of one name within a message that lists several."""
