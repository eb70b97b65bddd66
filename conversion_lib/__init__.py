"""Ferry: carries checkpoints between Hugging Face (safetensors) and MaxText (Orbax)."""

__version__ = "0.1.0"
