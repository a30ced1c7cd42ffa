"""The documents are true: links point at what they name, commands run and print what is shown, settings exist.

The conventions, all of them plain Markdown:

    [text](file.py#L20 "words")     line 20 of the file, and no other, holds these words
    a block of ```bash              is run: the blocks of a page in order, in one folder, with quick settings
    a ```text block right below it  is what it prints: a command's stdout or, when it fails, its line on stderr
    <!-- not run: reason -->        above a block: it is not run, and why
    <!-- file: NAME -->             above a block: its content is that file, for the commands below

`python tests/docs/test_docs.py` mends line numbers that have moved and output that has changed.
"""

import contextlib
import importlib
import io
import json
import math
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for `python tests/docs/test_docs.py`

from burnish.cli import main  # noqa: E402
from burnish.config import fields, parse  # noqa: E402
from burnish.data.audit import MEANINGS  # noqa: E402
from burnish.data.formats import FORMATS, recognise  # noqa: E402
from burnish.model.checkpoint import init_model, save_model, weight_shapes  # noqa: E402
from burnish.model.families import parse_config  # noqa: E402
from tests.tiny import TINY_CONFIG, instead, tiny_tokenizer  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

BLOCK = re.compile(
    r"(?:^<!-- (not run|file): ([^\n]*?) -->\n)?^```(\w*)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S
)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)(?: \"([^\"]*)\")?\)")
SETTING = re.compile(r"(model|adapter|data|evaluate|optim|run|save)\.(\w+)(=.*)?")
FILE_ENDINGS = ("json", "jsonl", "parquet", "py", "safetensors", "yaml")

QUICK = {
    "sft": (
        "run.device=cpu run.step_tokens=512 run.microbatch_tokens=512 data.max_length=512 data.limit=20 "
        "save.trackers=[]",
        "run.steps=2",
    ),
    "dpo": (
        "run.device=cpu run.step_tokens=512 run.microbatch_tokens=512 data.max_length=256 data.limit=20 "
        "save.trackers=[]",
        "run.steps=2",
    ),
    "reward": (
        "run.device=cpu run.step_tokens=1024 run.microbatch_tokens=1024 data.max_length=512 data.limit=20 "
        "save.trackers=[]",
        "run.steps=2",
    ),
    **dict.fromkeys(
        ("ppo", "grpo", "rloo", "reinforce"),
        # Two steps of SFT do not teach a model to end its answers: letters do it.
        ("run.device=cpu save.trackers=[]", "run.steps=2 rollout.prompts=4 rollout.max_tokens=16 rollout.stop=[a,e,i]"),
    ),
    "bench": ("run.device=cpu run.steps=1 length=16", ""),
    "eval": ("data.limit=20 data.max_length=512", ""),
    "generate": ("", "max_tokens=4"),
}
"""Words for a command that does not give these settings, and words in place of its own: so it takes little time."""

TEMPLATE_FREE = "meta-llama/Llama-2-7b-hf"
STAND_INS = (TEMPLATE_FREE, "Qwen/Qwen2.5-7B")
"""Hub ids for which folders of the same names, with tiny random models in them, stand in where commands run."""


@dataclass(frozen=True)
class Block:
    """A block of a page, with the mark above it and the output below it."""

    mark: str | None
    note: str | None
    language: str
    content: str
    shown: str | None
    span: tuple[int, int]
    """Where in the page the shown output stands."""

    @property
    def commands(self) -> list[list[str]]:
        lines = self.content.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(m[1], m[2], m[3], m[4], m[5], m.span(5)) for m in found]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=named)


@pages
def test_links_point_at_what_they_name(page: Path) -> None:
    for text, target, words in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, place = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"[{text}]: there is no {path}"
        if re.fullmatch(r"L\d+", place):
            assert words, f'[{text}] names a line: write what stands there, as in ({target} "words")'
            lines = lines_with(file, words)
            assert lines == [int(place[1:])], (
                f"[{text}]: '{words}' stands in lines {lines} of {path}, not {place}: run {__file__}"
            )
        elif place:
            assert place in anchors(file), f"[{text}]: {path} has no heading #{place}"


def lines_with(file: Path, words: str) -> list[int]:
    return [n for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if words in line]


def anchors(file: Path) -> set[str]:
    """The headings of a page as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(file), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def schemas() -> dict[str, type]:
    """The settings of each recipe and tool."""
    files = [path for kind in ("recipes", "tools") for path in (ROOT / "burnish" / kind).glob("[a-z]*.py")]
    return {path.stem: importlib.import_module(f"burnish.{path.parent.name}.{path.stem}").Config for path in files}


@pages
def test_settings_that_are_named_exist(page: Path) -> None:
    known = {key for schema in schemas().values() for key, *_ in fields(schema)}
    for quoted in re.findall(r"`([^`]+)`", prose(page)):
        for word in quoted.split():
            if (found := SETTING.fullmatch(word)) and found[2] not in FILE_ENDINGS:
                assert f"{found[1]}.{found[2]}" in known, f"there is no setting {word}"


@pages
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    wanted = re.findall(r"`make ([^`]*)`", prose(page))
    wanted += [
        " ".join(words[1:])
        for block in blocks(page)
        for words in block.commands
        if block.language == "bash" and words[0] == "make"
    ]
    assert {target for words in wanted for target in words.split()} <= targets


def test_what_is_not_run_says_why_and_has_settings_that_exist() -> None:
    bash = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
    idle = [block for block in bash if block.mark == "not run"]
    assert len(idle) < len(bash) / 2, f"{len(idle)} of {len(bash)} blocks are not run"
    for block in idle:
        assert len((block.note or "").split()) >= 3, f"say why this is not run:\n{block.content}"
        for words in block.commands:
            if "burnish" in words:
                name, *rest = words[words.index("burnish") + 1 :]
                given = [word for word in rest if "=" in word]
                assert not given or parse(schemas()[name], given)


def test_the_formats_in_the_table_are_those_that_are_read() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in rows] == list(FORMATS)
    for name, row in rows:
        assert recognise([json.loads(row)]) == name


def test_the_rules_in_the_tables_are_those_that_are_applied() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([a-z_]+)` \| [^`{]", text, re.M)
    assert sorted(told) == sorted(MEANINGS)


def test_the_arithmetic_of_memory_is_right() -> None:
    config = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    llama = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 32, **config}
    shapes = weight_shapes(parse_config(llama))
    layers = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    weights, linear = (sum(map(math.prod, some.values())) for some in (shapes, layers))
    ends = 2 * math.prod(shapes["lm_head.weight"])
    norms = weights - linear - ends
    lora = sum(16 * (outputs + inputs) for outputs, inputs in layers.values())
    dora = lora + sum(outputs for outputs, _ in layers.values())
    ia3 = sum(
        shape["down_proj" in name] for name, shape in layers.items() if re.search("k_proj|v_proj|down_proj", name)
    )
    bf16, nf4 = (bits / 8 * linear + 2 * ends + 4 * norms for bits in (16, 4 + 8 / 64 + 32 / (64 * 256)))
    expected = [(weights, 0.0), (lora, bf16), (dora, bf16), (ia3, bf16), (lora, nf4)]
    page = (ROOT / "docs" / "lora-and-qlora.md").read_text(encoding="utf-8")
    told = re.findall(r"\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(told) == len(expected)
    for (trained, *gib), (count, frozen) in zip(told, expected, strict=True):
        assert trained == f"{count:,}"
        assert [float(part) for part in gib] == [round(x / 2**30, 2) for x in (frozen, 16 * count, frozen + 16 * count)]
    assert all(f"{count:,} " in page for count in (linear, ends // 2, norms))


@pages
def test_commands_run_and_print_what_is_shown(page: Path, tmp_path: Path) -> None:
    with standing(tmp_path):
        compared = [(block.shown, said) for block, said in run_page(page) if block.shown is not None]
    for shown, said in compared:
        assert said == shown, f"run {__file__} to put the new output in"


@contextlib.contextmanager
def standing(folder: Path) -> Iterator[None]:
    """The folder as a reader's own, with tiny models in it that have the names of real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / ".cache"))
        for name in STAND_INS:
            tiny_model(folder / name)
        (folder / TEMPLATE_FREE / "chat_template.jinja").unlink()
        yield


def tiny_model(folder: Path) -> Path:
    tiny_tokenizer(folder)
    config = {
        **TINY_CONFIG,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_model(init_model(folder, seed=0), folder / ".made", folder)
    (folder / ".made" / "model.safetensors").rename(folder / "model.safetensors")
    return folder


def run_page(page: Path) -> Iterator[tuple[Block, str]]:
    """Every block of bash that is run, with what it printed."""
    for block in blocks(page):
        if block.mark == "file":
            assert block.note
            Path(block.note).write_text(block.content, encoding="utf-8")
        elif block.language == "bash" and block.mark is None:
            yield block, "".join(run(words, may_fail=block.shown is not None) for words in block.commands)


def run(words: list[str], may_fail: bool) -> str:
    """What a command prints: its stdout or, when it fails and may, the last line of its stderr."""
    program, name, *rest = words
    assert program == "burnish", f"only burnish is run, not {program}: write <!-- not run: reason --> above the block"
    missing, smaller = (given.split() for given in QUICK.get(name, ("", "")))
    rest = instead(missing, *instead(rest, *([] if may_fail else smaller)))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([name, *rest])
    assert status == 0 or may_fail, f"{' '.join(words)}\n{err.getvalue()}"
    lines = err.getvalue().splitlines()[-1:] if status else out.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def mend(page: Path, folder: Path) -> None:
    """Write the page anew with the lines that its links mean and the output that its commands give."""
    text = page.read_text(encoding="utf-8")
    with standing(folder):
        outputs = [(block.span, said) for block, said in run_page(page) if block.shown is not None]
    for (start, end), said in reversed(outputs):
        text = text[:start] + said + text[end:]

    def moved(link: re.Match[str]) -> str:
        path, _, place = link[2].partition("#")
        lines = lines_with((page.parent / path).resolve(), link[3]) if link[3] and place.startswith("L") else []
        return link[0].replace(f"#{place}", f"#L{lines[0]}") if len(lines) == 1 else link[0]

    page.write_text(LINK.sub(moved, text), encoding="utf-8")


if __name__ == "__main__":
    for each in PAGES:
        with tempfile.TemporaryDirectory() as place:
            mend(each, Path(place))
