"""Text to token ids and back, exactly as transformers does it, from the files of a checkpoint. Imports no torch."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", TOOL_TEMPLATE)
"""What makes up a tokenizer: copied by `save`, hashed into `fingerprint`."""
END_FILES = ("generation_config.json", "config.json")
"""Where a checkpoint names further tokens that end a response."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A tokenizer.json with the special tokens, the chat template and the end tokens that its folder names."""

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> None:
        # A length baked into tokenizer.json would cut sequences silently.
        backend.no_truncation()
        backend.no_padding()
        self.folder = folder
        self._backend = backend
        self._config = config
        self.special: dict[str, Any] = _special_tokens(config)
        """Named special tokens, `bos_token` -> its text, as chat templates see them."""
        _add_missing(backend, config, self.special)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.chat_template: str | None = _chat_template(folder, config)
        self.tool_template: str | None = _tool_template(folder, config)
        """What takes the place of `chat_template` in conversations with tools, where the folder has such a thing."""
        self.bos_id: int | None = self._id(self.special.get("bos_token"))
        self.eos_id: int | None = self._id(self.special.get("eos_token"))
        self.end_ids: frozenset[int] = _end_ids(folder, self.eos_id)
        """Tokens that end a response, from generation_config.json, config.json and eos_token."""
        self.adds_bos, self.adds_eos = self._ends_added()
        self.vocab_size: int = backend.get_vocab_size()
        self.fingerprint: str = _fingerprint(folder)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder.

        Raises ValueError when the folder has none, has one in another format only, or the file is broken.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(_missing(folder))
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from None
        config = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
        return cls(backend, folder, config)

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written in it are recognised; none is added but, if asked, the first.

        `add_bos` puts the beginning token in front where this tokenizer has the habit (`adds_bos`).
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.adds_bos and self.bos_id is not None else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and the characters from..to that each of them stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """The text of token ids, without special tokens unless asked."""
        return self._backend.decode(list(ids), skip_special_tokens=not keep_special)

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of one token."""
        return self._backend.id_to_token(id) or f"<{id}>"

    def id_of(self, token: str) -> int | None:
        """The id of a token spelled as in the vocabulary; None when there is no such token."""
        return self._backend.token_to_id(token)

    def save(self, folder: Path, template: str | None = None) -> None:
        """Copy the tokenizer's files into a folder; `template`, when given, becomes the one chat template there."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)
        source = template or self.chat_template
        if source is None:
            return
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        if source == self.chat_template:
            if self.tool_template is not None:  # beside a chat_template.jinja nobody reads the list in the config
                (folder / TOOL_TEMPLATE).parent.mkdir(exist_ok=True)
                (folder / TOOL_TEMPLATE).write_text(self.tool_template, encoding="utf-8")
            return
        # Leave no second template behind: readers take this one where there are tools, and old ones look in the config.
        (folder / TOOL_TEMPLATE).unlink(missing_ok=True)
        if "chat_template" in self._config:
            config = read_json(folder / "tokenizer_config.json") | {"chat_template": source}
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _ends_added(self) -> tuple[bool, bool]:
        """Whether plain text gets a beginning and an end token.

        The post-processor decides; as in transformers, `add_bos_token` beside a tokenizer.json does not.
        """
        ids: list[int] = self._backend.encode("").ids
        bos, eos = self.bos_id in ids[:1], self.eos_id in ids[-1:] and (self.eos_id != self.bos_id or len(ids) > 1)
        return bos, eos


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty when there is no such file. Raises ValueError for a broken one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}"
    other = next((name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()), None)
    if other is None:
        return f"{folder} has no tokenizer.json, so its model cannot read text"
    return (
        f"{folder} has {other} but no tokenizer.json; convert it once, where transformers is installed: "
        f"python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}')"
        f".save_pretrained('{folder}')\""
    )


def _special_tokens(config: dict[str, Any]) -> dict[str, Any]:
    special: dict[str, Any] = {}
    for name in NAMED:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            special[name] = value
    return special


def _add_missing(backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json knows, in the order in which transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed: dict[str, Any] = config.get("added_tokens_decoder") or {}
    named = set(special.values())
    missing: list[tokenizers.AddedToken] = []
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        flags = {key: bool(token.get(key)) for key in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        content = str(token["content"])
        if content not in known:
            flags["special"] |= content in named
            missing.append(tokenizers.AddedToken(content, **flags))
            known.add(content)
    missing += [
        tokenizers.AddedToken(text, special=True) for text in dict.fromkeys(special.values()) if text not in known
    ]
    if missing:
        backend.add_tokens(missing)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The folder's default template: chat_template.jinja, else tokenizer_config.json's entry, be it a named list."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = _named_templates(entry)
        entry = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
    return entry if isinstance(entry, str) else None


def _tool_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The folder's template for conversations with tools: a file, or an entry of the list that a file would hide."""
    path = folder / TOOL_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if not isinstance(entry, list) or (folder / "chat_template.jinja").is_file():
        return None
    source = _named_templates(entry).get("tool_use")
    return source if isinstance(source, str) else None


def _named_templates(entry: list[Any]) -> dict[str, Any]:
    return {str(item.get("name")): item.get("template") for item in entry if isinstance(item, dict)}


def _end_ids(folder: Path, eos_id: int | None) -> frozenset[int]:
    ids = set() if eos_id is None else {eos_id}
    for name in END_FILES:
        config = read_json(folder / name)
        text: dict[str, Any] = config.get("text_config") or {}
        for value in (config.get("eos_token_id"), text.get("eos_token_id")):
            ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (*FILES, *END_FILES):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
