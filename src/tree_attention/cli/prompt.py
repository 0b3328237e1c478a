"""What `tree-attention generate` reads: the document, the question, the template around them; or random tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


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


def prompt_ids(tokenizer: Any, document: str, prompt: str, *, plain: bool, limit: int | None) -> Tensor:
    """`[1, tokens]`: the document, the question, and the chat template around them if the tokenizer has one.

    plain: without the template. limit: cut the document's end so that there are no more tokens.
    """

    def tokens(text: str) -> list[int]:
        whole = f"{text}\n\n{prompt}" if text else prompt
        if plain or tokenizer.chat_template is None:
            return tokenizer(whole).input_ids
        message = [{"role": "user", "content": whole}]
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]

    ids = tokens(document)
    if limit is not None and len(ids) > limit:
        alone = len(tokens(""))
        kept = tokenizer(document).input_ids[: max(limit - alone, 0)]
        while kept and len(ids) > limit:  # around the cut and in the template there may be some tokens more
            ids = tokens(tokenizer.decode(kept, skip_special_tokens=True))
            kept = kept if len(ids) <= limit else kept[:-1]
        if not kept:
            raise InputError(f"max-prompt-tokens must be more than the {alone} of the prompt alone, got {limit}")
    return torch.tensor([ids])


def random_ids(config: Any, tokens: int, seed: int) -> Tensor:
    """`[1, tokens]`, the same on every rank."""
    vocabulary = config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))


def check_positions(config: Any, tokens: int, new_tokens: int) -> None:
    """Raise InputError if the model was not made for so many positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and tokens + new_tokens > positions:
        raise InputError(
            f"the model has {positions} positions, and {tokens} prompt tokens with {new_tokens} new ones "
            "do not fit: use --max-prompt-tokens to cut the document, or --extrapolate to go beyond its training"
        )
