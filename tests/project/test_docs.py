"""What README and docs say: code and commands that run, names that exist, links that lead somewhere.

They run as they are written, in a folder where tiny stand-ins are named as the repositories, and on tiny models in place
of SmolLM2 and its drafter: each page's python blocks in one namespace, its commands in one folder, from top to bottom. A
block that cannot run here is marked in the page: `<!-- skip: reason -->` on the line before it.
"""

import ast
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import copy_hub, make_hub
from helpers.paths import ROOT
from helpers.texts import Block, blocks_of, commands_in
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_eagle3
from hf_eagle3 import Eagle3DrafterConfig, Eagle3DrafterModel, cli, smollm2

pytestmark = pytest.mark.any_release

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("python", "py")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """A folder with stand-ins, in which a page's lines are typed."""
    monkeypatch.chdir(copy_hub(hub, tmp_path / "here"))


@pytest.fixture
def tiny_smollm2(monkeypatch, tmp_path, here):
    """`load_target` and `DRAFTER_FOLDER`, tiny."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    target = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            vocab_size=256,
            num_hidden_layers=4,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).eval()
    config = Eagle3DrafterConfig(
        **sizes,
        num_hidden_layers=1,
        head_dim=8,
        vocab_size=256,
        draft_vocab_size=128,
        aux_layer_ids=[1, 2, 3],
    )
    drafter = Eagle3DrafterModel(config)
    drafter.set_draft_to_target_ids(torch.arange(128) + 64)
    drafter.save_pretrained(tmp_path / "drafter")

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)

    monkeypatch.setattr(smollm2, "load_target", lambda *_, **__: smollm2.LoadedTarget(target, tokenizer, "pypi"))
    monkeypatch.setattr(smollm2, "DRAFTER_FOLDER", tmp_path / "drafter")


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page, tiny_smollm2, capsys):
    namespace = {"__name__": page.stem}
    for block in python_blocks(page):
        source = "\n" * (block.line - 1) + block.code  # so that a traceback shows the page's own line
        if block.skip is None:
            exec(compile(source, str(page), "exec"), namespace)
        else:
            ast.parse(source, str(page))
            assert block.skip.strip(), f"{page.name}:{block.line} is skipped without a reason"


# ---- commands ----

SHELLS = ("bash", "sh", "shell", "console")
LONG = ("quickstart.md", "training.md")  # pages whose commands take seconds


def shell_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in SHELLS]


def commands_that_run(page: Path) -> list[list[str]]:
    """Those of a page, but for the lines that test_packaging.py reads, and CI runs."""
    blocks = [block for block in shell_blocks(page) if block.skip is None and block.name is None]
    return [words for block in blocks for words in commands_in(block.code)]


def run_command(words: list[str], monkeypatch) -> int:
    """The exit status of a command of ours or of an example, in this process."""
    if "train" in words or "examples/finetune.py" in words:  # else bf16 takes a GPU for granted
        words = [*words, "--use_cpu", "--disable_tqdm", "True"]
    if words[0] == "hf-eagle3":
        return cli.main(words[1:])
    assert words[0] == "python", f"{words[0]} cannot run here: mark the block by <!-- skip: reason -->"
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(words[1], run_name="__main__")
    return ended.value.code or 0


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in LONG))
        for page in PAGES
        if commands_that_run(page)
    ],
)
def test_commands_run(page, here, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # a chat in which nothing is said
    for words in commands_that_run(page):
        assert run_command(words, monkeypatch) == 0, f"{words}: {capfd.readouterr().err}"


def test_commands_that_do_not_run_say_why():
    skipped = [(page.name, block) for page in PAGES for block in shell_blocks(page) if block.skip is not None]
    assert all(block.skip.strip() for _, block in skipped), skipped


def test_words_of_a_block_for_a_shell():
    assert commands_in("a 'b c' \\\n  d  # e\n\n# f\ng && h\n") == [["a", "b c", "d"], ["g"], ["h"]]


# ---- names and links ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    """Every `from hf_eagle3... import NAME` and `hf_eagle3.NAME` in a python block, skipped ones too."""
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_eagle3":
                module = __import__(node.module, fromlist=["*"])
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{page.name}:{block.line}: {node.module} has no {missing}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_eagle3":
                assert hasattr(hf_eagle3, node.attr), f"{page.name}:{block.line}: hf_eagle3 has no {node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links to {link}, which is not there"


def test_api_page_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text()
    documented = {name.rsplit(".", 1)[1] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    assert set(hf_eagle3.__all__) <= documented


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_a_broken_block_would_be_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```python\nx = 1\n```\n\n<!-- skip: needs a GPU -->\n```python\ny\n```\n\n```bash\nls\n```\n"
    )
    assert python_blocks(page) == [Block(4, "python", "x = 1\n", None), Block(9, "python", "y\n", "needs a GPU")]
