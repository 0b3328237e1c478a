"""What can be said of a command line before a model is loaded: options that cannot be, folders and documents."""

from pathlib import Path

from ..errors import InputError


def check_options(model: str | None, dtype: str, **tokens: int | None) -> None:
    """What can be said before a model is loaded. tokens: options that count them, if given."""
    if model is not None:
        check_model_folder(model)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    if any(count is not None and count < 1 for count in tokens.values()):
        *others, last = (name.replace("_", "-") for name in tokens)
        raise InputError(f"{', '.join(others)} and {last} must be at least 1")


def check_model_folder(model: str) -> None:
    """A path must be a folder with a model and a tokenizer; anything else is taken for a name on the hub."""
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
