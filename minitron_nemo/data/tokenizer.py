"""The tokenizer of a checkpoint directory, as data needs it: plain text in, token ids out, one document separator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_nemo.errors import UserError

# What pretraining puts between documents, in the vocabularies that have it; an instruction-tuned model's own end
# token ends a turn, not a document.
DOCUMENT_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")


class Tokenizer:
    """Wraps a Hugging Face tokenizer; names of special tokens inside a document are encoded as ordinary text."""

    def __init__(self, tokenizer: Any, separator_id: int) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.separator_id = separator_id
        self.vocab_size: int = len(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids without any token that the text does not spell."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    @property
    def prefix_id(self) -> int:
        """See `prefix_id`; the document separator in a vocabulary that has neither."""
        found = prefix_id(self._tokenizer)
        return self.separator_id if found is None else found

    def encode_prompt(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """See `encode_prompt`."""
        try:
            return encode_prompt(self._tokenizer, text, self.prefix_id, add_special_tokens)
        finally:
            self._backend.encode_special_tokens = True  # which the wrapped tokenizer sets as it needs it

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens by their names."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides token ids, independent of the files it was read from."""
        return hashlib.sha256(f"{self.separator_id}\n{self._backend.to_str()}".encode()).hexdigest()


def prefix_id(tokenizer: Any) -> int | None:
    """What stands before a text without a context, as in lm-evaluation-harness: the first token, else the end token."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if first is None else int(first)


def encode_prompt(tokenizer: Any, text: str, prefix: int, add_special_tokens: bool | None = None) -> list[int]:
    """Token ids as lm-evaluation-harness's adapter of Hugging Face models has them.

    Special tokens are known by their names, and the tokenizer adds what it adds by itself, unless told otherwise or
    where the text begins with the name of `prefix`: never two first tokens.
    """
    if add_special_tokens is None:
        add_special_tokens = not text.startswith(str(tokenizer.decode([prefix])))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
    return ids


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer in `directory`, never the network. Raises UserError."""
    from transformers import AutoTokenizer

    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; a tokenizer is read from a checkpoint's tokenizer files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{directory}: no readable tokenizer ({' '.join(str(error).split())[:200]})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: only tokenizers with a tokenizer.json are supported; convert it to one")
    return Tokenizer(tokenizer, _separator_id(tokenizer, directory))


def _separator_id(tokenizer: Any, directory: Path) -> int:
    vocabulary = tokenizer.get_vocab()
    for token in DOCUMENT_SEPARATORS:
        if token in vocabulary:
            return int(vocabulary[token])
    if tokenizer.eos_token_id is None:
        raise UserError(f"{directory}: the tokenizer has no end token to separate documents with; set eos_token")
    return int(tokenizer.eos_token_id)
