"""MaxText's own vocabulary: its command-line arguments, its model names, the settings of each release."""
