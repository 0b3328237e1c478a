"""Checks of options, model folders and documents that need no model, made before the ranks start."""

from pathlib import Path

from ..errors import InputError
from .options import ChatOptions, GenerateOptions, VerifyOptions


def check_options(options: GenerateOptions | ChatOptions | VerifyOptions) -> None:
    """Raise InputError for a model folder, a dtype or a number of tokens that cannot be right."""
    if options.model is not None:
        check_model_folder(options.model)
    if options.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be auto, float32, bfloat16 or float16, got {options.dtype!r}")
    for name, value in vars(options).items():
        if name.endswith("_tokens") and value is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")


def check_model_folder(model: str) -> None:
    """Raise InputError unless `model` is a folder with a model and a tokenizer, or could be a name on the hub."""
    folder = Path(model)
    if not folder.exists():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise InputError(f"model must be a folder or a name on the hub (owner/name), and {model!r} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"model folder {model} must hold a config.json: is it a transformers model?")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"model folder {model} has no tokenizer (tokenizer.json): save it there with save_pretrained")


def read_document(file: Path | None) -> str:
    """Return the text of the file; "" without a file."""
    if file is None:
        return ""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file {file} must be UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise InputError(f"file {file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise InputError(f"file {file} must hold text, and is empty")
    return text
