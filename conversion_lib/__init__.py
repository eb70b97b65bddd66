"""Ferry converts checkpoints between Hugging Face (safetensors) and MaxText (Orbax). Its functions are in `api`."""

__version__ = "0.1.0"
