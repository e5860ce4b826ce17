"""Every code block of the README and the pages: Python runs, commands have the options that they use.

A comment `<!-- not run: REASON -->` above a Python block says why it is only compiled, such as a GPU that it needs.
"""

import ast
import importlib
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "artifacts/FORMAT.md", "bench/results/README.md"),
    "deploy/README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
LANGUAGES = {"console", "js", "json", "python", "sh", "text", "toml", "yaml"}

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (\S.*?) -->\s*$")


class Block(NamedTuple):
    """A fenced block; `line` is the number of its first line, `not_run` the reason why it is only compiled."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None


def blocks_of(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        indent, language, code = match.groups()
        before = text[: match.start()]
        reason = _NOT_RUN.search(before)
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        yield Block(page, before.count("\n") + 2, language, code, reason[1] if reason else None)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script, without redirections and assignments."""
    script = re.sub(r"(^|\s)#.*$", "", script.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";<>|&\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: list[str] = []
    is_file = False
    for word in [*lexer, "\n"]:
        if not word.strip(";|&\n"):
            while words and re.match(r"\w+=", words[0]):
                del words[0]
            if words:
                yield words
            words = []
        elif not word.strip("<>"):
            is_file = True
        elif is_file:
            is_file = False
        else:
            words.append(word)


COMMANDS = [(block, words) for block in BLOCKS if block.language == "sh" for words in commands_of(block.text)]


def click_command(name: str) -> click.Command:
    """What a console script of this package runs."""
    (script,) = entry_points(group="console_scripts", name=name)
    command = importlib.import_module(script.module).command
    assert isinstance(command, click.Command)
    return command


def identifier(value: object) -> str | None:
    if isinstance(value, Block):
        return f"{value.page}:{value.line}"
    return value[0] if isinstance(value, list) else None


@pytest.mark.parametrize("block", BLOCKS, ids=identifier)
def test_block_names_its_language(block: Block) -> None:
    assert block.language in LANGUAGES, f"{block.page}, line {block.line}: '{block.language}'"
    if block.language == "json":
        json.loads(block.text)
    if block.language == "toml":
        tomllib.loads(block.text)
    if block.language == "sh":
        subprocess.run(["/bin/bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_python_runs(
    page: str, demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page in one namespace, where an export of the demo checkpoint was made before."""
    (tmp_path / "ettin-reranker-demo").mkdir()
    (tmp_path / "ettin-reranker-demo" / "openvino-int8").symlink_to(demo_artifacts["openvino", "int8"])
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "page"}
    for block in (block for block in BLOCKS if block.page == page and block.language == "python"):
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")
        if block.not_run is None:
            exec(code, scope)  # noqa: S102


@pytest.mark.parametrize(
    ("block", "words"), [each for each in COMMANDS if each[1][0].startswith("ettin-")], ids=identifier
)
def test_command_exists_with_its_options(block: Block, words: list[str]) -> None:
    name, *arguments = words
    command = click_command(name)
    if isinstance(command, click.Group):
        subcommand = command.commands.get(arguments[0])
        assert subcommand is not None, f"{block.page}, line {block.line}: {name} has no '{arguments[0]}'"
        command, arguments = subcommand, arguments[1:]
    try:
        with suppress(click.exceptions.Exit):  # --help and the like
            command.make_context(name, arguments)
    except click.UsageError as error:  # a file that a reader has and this test has not
        assert "does not exist" in error.message, f"{block.page}, line {block.line}: {error.message}"


@pytest.mark.parametrize(
    ("block", "words"), [each for each in COMMANDS if not each[1][0].startswith("ettin-")], ids=identifier
)
def test_other_commands_name_what_exists(block: Block, words: list[str]) -> None:
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in (target for target in targets if "=" not in target):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        case ["python" | "python3", path, *_] if path.endswith(".py"):
            assert (ROOT / path).is_file(), path
        case _:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            extras = re.findall(r"(?:ettin-export|^\.)\[([\w,-]+)\]", "\n".join(words), re.MULTILINE)
            for extra in (extra for names in extras for extra in names.split(",")):
                assert extra in project["optional-dependencies"], (block.page, block.line, extra)


def test_readme_shows_what_the_command_prints(
    demo_artifacts: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores differ a little between processors; their order, and all other columns, must not."""
    blocks = list(blocks_of("README.md"))
    number = next(number for number, block in enumerate(blocks) if block.language == "text")
    (_, (_, _, *documents), (name, _, *arguments)) = commands_of(blocks[number - 1].text)
    (tmp_path / arguments[-1]).write_text("\n".join(documents))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(click_command(name), [str(demo_artifacts["openvino", "int8"]), *arguments])
    assert result.exit_code == 0, result.output
    printed, shown = (
        [line.split(maxsplit=3) for line in text.splitlines()] for text in (result.stdout, blocks[number].text)
    )
    assert [(row[0], *row[2:]) for row in printed] == [(row[0], *row[2:]) for row in shown]
    assert [float(row[1]) for row in printed[1:]] == pytest.approx([float(row[1]) for row in shown[1:]], abs=0.5)


def test_help_and_pages_show_the_same_examples() -> None:
    examples = importlib.import_module("ettin.export.cli").EXAMPLES
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    help_text = CliRunner().invoke(click_command("ettin-export"), ["--help"]).output
    assert all(example in page and example in help_text for example in examples)
    assert examples[0] in (ROOT / "README.md").read_text(encoding="utf-8")


def strings_of(path: Path) -> Iterator[str]:
    """The string constants of a module; a line break stands where an f-string inserts a value."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_troubleshooting_quotes_real_messages() -> None:
    sources = [path for name in ("artifacts", "runtimes", "export", "gpu") for path in (ROOT / name).rglob("*.py")]
    messages = "\n".join(text for path in sources for text in strings_of(path))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        quote for line in re.findall(r"^### (.*)", page, re.MULTILINE) for quote in re.findall(r"`([^`]+)`", line)
    ]
    assert len(quoted) > 15
    for quote in quoted:
        for part in (part.strip() for part in quote.split("…")):
            assert part in messages, f"no message has the words: {part}"
