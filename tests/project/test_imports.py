"""Who may import whom, and what an import may cost."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import TESTS

import hf_eagle3

PACKAGE = Path(hf_eagle3.__file__).parent

# Package -> its modules and folders. A row imports from itself and from the rows below it; no row in a circle.
LAYERS = {
    ".": [
        ["cli"],
        ["bench", "lm_eval"],
        ["__init__"],
        ["diagnosis", "training"],
        ["host"],
        ["checkpoints", "decoding"],
        ["drafters"],
        ["rows"],
        ["kernels", "recorder"],
        ["speculation", "smollm2", "tensor_parallel", "data_parallel"],
        ["compat", "console"],
        ["modeling"],
    ],
    "cli": [
        ["__main__"],
        ["__init__"],
        [
            "bench",
            "chat",
            "check",
            "data",
            "demo",
            "doctor",
            "drift",
            "env",
            "export",
            "inspect",
            "regenerate",
            "serve",
            "states",
            "train",
        ],
        ["conversation", "preview"],
        ["rows"],
        ["arguments", "loading", "starting"],
    ],
    "bench": [
        ["__init__"],
        ["check", "command", "open_loop"],
        ["tables"],
        ["loading", "report"],
        ["measure", "reads"],
        ["attempts", "judging"],
        ["results"],
        ["equality", "ways"],
        ["dflash", "shapes", "side_by_side"],
        ["arguments", "names", "prompts"],
    ],
    "checkpoints": [
        ["__init__"],
        ["describe", "exporter"],
        ["block_export", "card", "load", "target_name"],
        ["blocks"],
        ["convert", "engines"],
        ["layer_ids", "measuring", "rope"],
        ["block_flavours", "flavours"],
    ],
    "kernels": [
        ["fusion"],
        ["attention", "state_space"],
        ["argmax", "delta_rule", "experts", "head_loss", "linear", "noise", "norms", "rotary", "temperature", "top"],
        ["deferred", "mlp", "onednn", "qkv"],
        ["language"],
    ],
    "kernels/fusion": [
        ["fuse"],
        ["experts", "functions", "modules"],
        ["projections"],
        ["trials"],
    ],
    "console": [
        ["devices", "interrupts", "opening", "progress", "streaming", "tables"],
        ["quoting", "spelling", "terminal"],
        ["installed", "paths"],
    ],
    "host": [
        ["install", "serving"],
        ["batching"],
        ["generate", "manager", "metrics"],
        ["request_rows"],
        ["desk"],
        ["assisted", "attaching", "output"],
        ["candidates", "request", "undrafted"],
        ["auto_config", "loop_choice", "pipelines", "processors", "shapes", "stopping"],
        ["refusals", "seeds"],
    ],
    "decoding": [
        ["in_flight"],
        ["engine"],
        ["captured", "choosing", "straight"],
        ["arena", "chunks", "company", "in_order", "loop"],
        ["phases", "transcript"],
        ["cuda_graphs", "lock", "row", "state"],
        ["prefill"],
        ["columns", "preparation", "room"],
    ],
    "drafters": [
        ["kinds"],
        ["blocks", "nobody", "parallel"],
        ["chain"],
        ["block_unroll", "draft", "unroll"],
    ],
    "rows": [
        ["attention_trial", "forwards", "recurrent_trial"],
        ["recurrent"],
        ["attention", "delta_nets", "state_spaces"],
        ["cache"],
        ["layers"],
        ["states"],
        ["masks", "memory", "rotation"],
        ["block", "substitutes"],
    ],
    "speculation": [
        ["costs", "coverage"],
        ["accept"],
        ["block_verification", "shared_noise"],
        ["noise", "rates"],
        ["sampling", "stats", "verdict", "warpers"],
        ["numbers", "shape"],
        ["tree"],
    ],
    "training": [
        ["__init__"],
        ["script"],
        ["trainer"],
        ["checkpointed_trainer", "evaluation", "preparing"],
        ["callbacks", "checkpointing", "forecast", "metrics", "recipe"],
        ["forecast_blocks"],
        ["distributed"],
        ["loading"],
        ["kinds"],
        ["arguments", "new_drafter"],
        ["states"],
        ["step"],
        ["data"],
        ["amounts", "locks", "sizes"],
    ],
    "training/states": [
        ["writer"],
        ["head_check", "shared", "stored"],
        ["documents", "online", "plan", "stored_target"],
        ["folder", "packed"],
    ],
    "training/step": [
        ["blocks", "ttt"],
        ["head_loss", "unroll_rows"],
        ["attention", "losses", "target_head"],
        ["acceptance", "batch", "elementwise"],
    ],
    "training/data": [
        ["regenerate"],
        ["answer_shards", "answer_turns", "preview", "reading"],
        ["eval_rows", "prompts", "vocabulary"],
        ["token_rows"],
        ["checking"],
        ["rendering", "sources"],
        ["conversations", "files", "packing"],
    ],
}
RANKS = {
    package: {name: rank for rank, layer in enumerate(layers) for name in layer} for package, layers in LAYERS.items()
}
MODULES = sorted(
    path.relative_to(PACKAGE)
    for path in PACKAGE.rglob("*.py")
    if "modeling" not in path.parts and "assets" not in path.parts
)


def is_for_typing_only(node):
    return isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"


def find_imports(tree, *, lazily):
    """Dotted names imported at the top of a module, or inside its functions too."""
    for node in ast.iter_child_nodes(tree):
        if is_for_typing_only(node) or (isinstance(node, ast.FunctionDef) and not lazily):
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)
        else:
            yield from find_imports(node, lazily=lazily)


def parts_in(package, path):
    """The part of `package` that the module at `path` belongs to; None for a module outside."""
    try:
        inner = path.relative_to(package)
    except ValueError:
        return None
    return inner.parts[0].removesuffix(".py")


def inner_imports(package, path, *, lazily=False):
    """Parts of `package` that its module at `path` imports."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for level, name in find_imports(tree, lazily=lazily):
        if level == 0 and not name.startswith("hf_eagle3."):
            continue
        above = path.parts[: len(path.parts) - level] if level else ()
        target = Path(*above, *name.removeprefix("hf_eagle3." if not level else "").split("."))
        if (part := parts_in(package, target)) is not None:
            yield part if part in RANKS[package] else "__init__"


def modules_of(package):
    return [(package, path) for path in MODULES if parts_in(package, path) is not None]


@pytest.mark.parametrize(("package", "path"), [pair for package in LAYERS for pair in modules_of(package)], ids=str)
def test_imports_point_downwards(package, path):
    ranks, module = RANKS[package], parts_in(package, path)
    if module == "__init__" and package != "." and "__init__" not in ranks:
        return
    assert module in ranks, f"{module} has no place in the layers of {package}"
    for imported in inner_imports(package, path):
        if imported != module:
            assert ranks[imported] >= ranks[module], f"{path} imports {imported}, which is further out"


@pytest.mark.parametrize("package", LAYERS)
def test_nothing_imports_in_a_circle(package):
    edges = {}
    for _, path in modules_of(package):
        module = parts_in(package, path)
        edges.setdefault(module, set()).update(set(inner_imports(package, path)) - {module})
    done = set()
    while ready := [m for m in edges if m not in done and edges[m] <= done | {"modeling"}]:
        done.update(ready)
    assert done == set(edges), f"a circle among {sorted(set(edges) - done)}"


@pytest.mark.parametrize("package", LAYERS)
def test_layers_name_what_exists(package):
    found = {parts_in(package, path) for _, path in modules_of(package)} | {"modeling"}
    assert set(RANKS[package]) <= found


def test_network_imports_nothing_of_ours():
    for path in (PACKAGE / "modeling").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for level, name in find_imports(tree, lazily=True):
            first = name.split(".")[0]
            assert level or first in {
                *sys.stdlib_module_names,
                "torch",
                "transformers",
                "safetensors",
                "huggingface_hub",
            }


def test_tests_share_through_helpers_alone():
    """No file of `tests/` imports from a test file, nor from a conftest."""
    files = sorted(TESTS.rglob("*.py"))
    private = {path.stem for path in files if path.parent.name != "helpers"}
    private |= {"tests", *(path.name for path in TESTS.iterdir() if path.is_dir() and path.name != "helpers")}
    for path in files:
        for _, name in find_imports(ast.parse(path.read_text(encoding="utf-8")), lazily=True):
            assert name.split(".")[0] not in private, f"{path.relative_to(TESTS)} imports {name}"


def test_test_files_have_names_of_their_own():
    """They lie in folders that are no packages, so pytest knows them by file name alone."""
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))


def run_python(code):
    """What a fresh process prints, and what it says to stderr: lines, without the numbers in them."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:hf_eagle3", "-c", code],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        check=True,
    )
    return done.stdout, {re.sub(r"\d+", "0", line) for line in done.stderr.splitlines()}


@pytest.mark.any_release
def test_import_is_silent_and_leaves_training_out():
    code = "import sys, hf_eagle3; print(sorted(m for m in sys.modules if 'training' in m and 'hf_eagle3' in m))"
    printed, said = run_python(code)
    assert printed == "[]\n"
    # The host loads some packages if they are there, which may talk.
    _, said_by_host = run_python("import transformers.generation.utils, transformers.modeling_utils")
    assert said <= said_by_host


def test_public_names_are_listed():
    """Those that are imported when they are first used, too."""
    assert set(hf_eagle3.__all__) <= set(dir(hf_eagle3))


def test_public_names_are_there():
    for name in hf_eagle3.__all__:
        if not name.startswith("Eagle3Train"):  # theirs to test; importing them costs seconds
            assert getattr(hf_eagle3, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Eagle4'"):
        _ = hf_eagle3.Eagle4
