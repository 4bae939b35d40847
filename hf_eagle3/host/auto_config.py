"""Published drafters through `AutoConfig`."""

import functools
import os
import sys
from typing import Any

from ..checkpoints.load import load_published_config

# What the host's `PreTrainedConfig.get_config_dict` takes for itself (5.23 configuration_utils.py).
HUB_KEYS = frozenset(
    {
        *("cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only", "proxies", "revision"),
        *("subfolder", "token", "trust_remote_code", "_commit_hash", "_from_auto", "_from_pipeline"),
    }
)


# Packages that serve drafters by classes of their own, and read configs by `AutoConfig` for them.
SERVERS = ("sglang", "vllm")


# Transformers 5.23 models/auto/configuration_auto.py:AutoConfig.from_pretrained
def wrap_from_pretrained(original: classmethod) -> classmethod:
    """Published drafters, none of which says `model_type: eagle3`."""

    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        is_place = isinstance(pretrained_model_name_or_path, (str, os.PathLike))  # else the host complains
        asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        is_ours = is_place and asking not in SERVERS
        config = load_published_config(pretrained_model_name_or_path, **kwargs) if is_ours else None
        if config is None:
            return original.__get__(None, cls)(pretrained_model_name_or_path, **kwargs)
        return_unused_kwargs = kwargs.pop("return_unused_kwargs", False)
        unused = {}
        for key, value in kwargs.items():
            if key in HUB_KEYS:
                continue
            if hasattr(config, key):
                setattr(config, key, value)
            else:
                unused[key] = value
        return (config, unused) if return_unused_kwargs else config

    return classmethod(from_pretrained)
