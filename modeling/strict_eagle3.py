"""What the configs of drafters of all kinds share.

Copied into every published drafter and run from there with `trust_remote_code=True`: it imports nothing but
Transformers, huggingface_hub and its siblings.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .fields_eagle3 import HOST_KEYS, DrafterFields, check_host_values, refuse_second_rope
from .weights_eagle3 import CheckpointError, read_json_file

if TYPE_CHECKING:

    class Base(DrafterFields, PreTrainedConfig):
        """What a config is beside."""

else:
    Base = object


class StrictConfig(Base):
    """What configs of drafters of all kinds do where the host's would guess: unknown keys and damaged files are errors."""

    has_no_defaults_at_init = (
        True  # so that the host up to 5.17 does not make one without sizes, to save its difference
    )
    keys_to_ignore_at_inference = ["past_key_values"]

    def __post_init__(self, **kwargs):
        name = type(self).__name__
        if (model_type := kwargs.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(
                f"This config says model_type {model_type!r}, expected {self.model_type!r}. Published drafters of other "
                "layouts load with AutoModel.from_pretrained, after `import hf_eagle3`."
            )
        if unknown := sorted(kwargs.keys() - HOST_KEYS):
            raise ValueError(
                f"{name} got keys it does not know: {unknown}. An ignored key may change the drafter's "
                "arithmetic, so none is ignored: remove them, or spell them as listed in the class's docstring."
            )
        refuse_second_rope(self.rope_parameters, kwargs.get("rope_scaling"), kwargs.get("rope_theta"))
        self.finish_fields()
        PreTrainedConfig.__post_init__(self, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a config; see `PreTrainedConfig.from_pretrained`. Raises as `from_dict`, and says which file it was."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))  # as AutoConfig does
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        read_json_file(Path(json_file))  # more strictly than the host
        return super()._dict_from_json_file(json_file)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Make a config from a table of keys; see `PreTrainedConfig.from_dict`.

        Raises:
            CheckpointError: A key is not known, missing, or of the wrong type or range.
        """
        try:
            check_host_values(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            place = config_dict.get("_name_or_path") or kwargs.get("name_or_path") or kwargs.get("_name_or_path")
            where = f"{place}/config.json" if place else "config"
            raise CheckpointError(f"{where}: {error}") from error
